"""combine --include and --exclude: the result has the chosen parts of the adapters alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import deltas
from helpers.choosing import HEAD, PATHS, layered_lora
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import MatchError, UsageError


@pytest.fixture
def pair_of(tmp_path: Path) -> list[Path]:
    return [layered_lora(tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)]


def test_only_what_is_chosen_is_combined(pair_of: list[Path], tmp_path: Path) -> None:
    """Its deltas are the weighted sum, other modules are not there; report and record say so."""
    out = tmp_path / "out"
    report = loratool.combine(
        pair_of, out, weights=[0.7, -0.4], include="self_attn.*", exclude=["layers.0.*"]
    )
    kept = [path for path in PATHS if "attn" in path and "layers.0." not in path]
    found = deltas(out)
    assert sorted(found) == sorted(kept)
    one, two = map(deltas, pair_of)
    for path in kept:
        assert np.allclose(found[path], 0.7 * one[path] - 0.4 * two[path], atol=1e-4)
    assert [len(names) for names in report.excluded] == [len(PATHS) - len(kept)] * 2
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["include"] == ["self_attn.*"]
    assert all(entry["left_out"] for entry in record["adapters"])


def test_clashing_heads_can_be_left_out(tmp_path: Path) -> None:
    """Saved tensors that differ are in the way only where somebody wants them."""
    one = layered_lora(tmp_path / "one", 1, saves_head=True)
    two = layered_lora(tmp_path / "two", 2, saves_head=True)
    weights = two / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{HEAD}"] += 1
    save_file(tensors, weights)
    with pytest.raises(MatchError, match="held whole"):
        loratool.combine([one, two], tmp_path / "out")
    report = loratool.combine([one, two], tmp_path / "out", exclude="lm_head")
    assert report.saved == []
    assert report.excluded == [[HEAD], [HEAD]]


def test_a_file_that_goes_along_is_wanted_or_not(tmp_path: Path) -> None:
    """Weights beside the factors are copied as a file, which has no half."""
    adapter = layered_lora(tmp_path / "adapter")
    beside = {f"model.mm_projector.{n}.weight": np.ones((3, 3), np.float32) for n in (0, 2)}
    save_file(beside, adapter / "mm_projector.safetensors")
    with pytest.raises(MatchError, match="goes along as it is"):
        loratool.combine(adapter, tmp_path / "no", exclude="mm_projector.0")
    loratool.combine(adapter, tmp_path / "out", exclude="mm_projector.*")
    assert not (tmp_path / "out" / "mm_projector.safetensors").exists()
    loratool.combine(adapter, tmp_path / "all", exclude="up_proj")
    assert (tmp_path / "all" / "mm_projector.safetensors").exists()


def test_a_glob_that_fits_nothing_is_refused(pair_of: list[Path], tmp_path: Path) -> None:
    """As everywhere."""
    with pytest.raises(UsageError, match="matches no part"):
        loratool.combine(pair_of, tmp_path / "out", include="q_pro")
