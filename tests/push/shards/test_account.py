"""The account of staged shards on their branch, and shards that are no longer what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.digests import blake3_of
from helpers.outcomes import assert_clear

from loratool.errors import HubError
from loratool.merging.counts import Counts
from loratool.merging.executor import Written
from loratool.publishing.shard_upload import Shipment, _entries

SHARD = "model.safetensors"
ENTRY: dict[str, Any] = {"sha256": "0" * 64, "digest": blake3_of(b"a shard"), **Counts().__dict__}


def test_an_account_comes_back() -> None:
    assert _entries(json.dumps({SHARD: ENTRY}).encode()) == {SHARD: ENTRY}


@pytest.mark.parametrize("digest", [None, 3, "", "0" * 64, "md5:" + "0" * 32])
def test_an_account_without_digests_counts_for_nothing(digest: object) -> None:
    """Such as one of shards with their sha256 alone: loratool.json would be without BLAKE3s."""
    assert _entries(json.dumps({SHARD: {**ENTRY, "digest": digest}}).encode()) == {}
    without = {name: value for name, value in ENTRY.items() if name != "digest"}
    assert _entries(json.dumps({SHARD: without}).encode()) == {}


def test_a_shard_that_is_not_what_was_written_stays_here(tmp_path: Path) -> None:
    """Changed between writing and uploading: refused before anything is sent."""
    (tmp_path / SHARD).write_bytes(b"another shard")
    shipment = object.__new__(Shipment)
    shipment._folder = tmp_path
    with pytest.raises(HubError) as caught:
        shipment._send(SHARD, Written({SHARD: blake3_of(b"a shard")}))
    assert_clear(caught.value, SHARD, "changed after it was written")
