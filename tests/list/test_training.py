"""When and with which words an adapter was trained, as far as metadata say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.listing import entries, kohya

from loratool.cataloguing.training import frequent_tags, training_end

ENDED = 1_700_000_000


def test_kohyas_metadata_are_read(tmp_path: Path) -> None:
    """Time, base, rank, phrase and the most frequent tags come from the header."""
    tags = {"10_sks": {"sks dog": 10, "grass": 3}, "1_reg": {"grass": 9, "sky": 1}}
    kohya(
        tmp_path / "x.safetensors", ss_training_finished_at=f"{ENDED}.5", ss_network_dim="4",
        ss_sd_model_name="v1-5.ckpt", ss_tag_frequency=json.dumps(tags),
        **{"modelspec.trigger_phrase": "sks dog"},
    )  # fmt: skip
    entry = entries(tmp_path)["x.safetensors"]
    assert (entry.trained, entry.trained_from) == ("2023-11-14T22:13:20Z", "metadata")
    assert (entry.base, entry.ranks) == ("v1-5.ckpt", [4])
    assert (entry.triggers, entry.tags) == (["sks dog"], ["grass", "sks dog", "sky"])


def test_without_metadata_the_time_is_the_files(tmp_path: Path) -> None:
    """It is marked as such."""
    os.utime(kohya(tmp_path / "x.safetensors"), (ENDED, ENDED))
    entry = entries(tmp_path)["x.safetensors"]
    assert (entry.trained, entry.trained_from) == ("2023-11-14T22:13:20Z", "file")


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e300", "0", "yesterday", "", "1" * 5000])
def test_times_that_are_none_are_not_believed(text: str) -> None:
    """Numbers of no calendar say nothing."""
    assert training_end({"ss_training_finished_at": text, "modelspec.date": text}) is None


def test_the_date_of_modelspec_is_read() -> None:
    """With and without a time zone."""
    assert training_end({"modelspec.date": "2024-05-01T10:00:00"}) == "2024-05-01T10:00:00Z"
    assert training_end({"modelspec.date": "2024-05-01T10:00:00+02:00"}) == "2024-05-01T08:00:00Z"


@pytest.mark.parametrize(
    "text", ["[", "[" * 100_000, "[]", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {"b": true}}', "1"]
)
def test_odd_tables_of_tags_say_nothing(text: str) -> None:
    """Whatever stands there, there are no tags and no crash."""
    assert frequent_tags({"ss_tag_frequency": text}) == []
