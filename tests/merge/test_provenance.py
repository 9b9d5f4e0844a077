"""What loratool.json says of a merge."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.digests import blake3s
from helpers.merging import ADAPTER
from helpers.outcomes import sha256s
from helpers.places import FIXTURES
from safetensors.numpy import load_file

import loratool


def test_provenance_names_inputs_by_hash(tmp_path: Path) -> None:
    """loratool.json has versions, options, hashes of adapter files, base identity,
    and neither a path nor a date."""
    import hashlib

    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", weights=[0.5])
    text = (tmp_path / "out" / "loratool.json").read_text()
    record = json.loads(text)
    adapter = FIXTURES / "adapter" / "adapter_model.safetensors"
    expected = hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert record["adapters"][0]["files"]["adapter_model.safetensors"] == expected
    options = {"dtype": "float16", "weights": [0.5], "allow_unmatched": False}
    assert record["options"] == options
    assert record["versions"].keys() == {"loratool", "torch", "numpy"}
    assert len(record["base"]["header_sha256"]) == 64
    assert record["shards"].keys() == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert str(tmp_path) not in text
    assert str(FIXTURES) not in text
    for name in record["shards"]:
        assert load_file(tmp_path / "out" / name)


def test_provenance_holds_the_hashes_of_the_files(fixture_merged: Path) -> None:
    """loratool.json gives the BLAKE3 of every shard and the sha256 of the adapter's files."""
    provenance = json.loads((fixture_merged / "loratool.json").read_text())
    assert provenance["schema_version"] == 2
    assert provenance["shards"] == blake3s(fixture_merged)
    assert provenance["adapters"][0]["files"] == sha256s(ADAPTER)
