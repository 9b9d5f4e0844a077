"""convert --include and --exclude: the chosen parts in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import config_of, deltas
from helpers.choosing import HEAD, PATHS, layered_lora
from safetensors.numpy import load_file

import loratool
from loratool.errors import UsageError


def test_parts_of_an_adapter_are_one_themselves(tmp_path: Path) -> None:
    """Without --to in its own dialect, with a config of the modules that are there."""
    adapter, out = layered_lora(tmp_path / "adapter", saves_head=True), tmp_path / "out"
    report = loratool.convert(adapter, out, exclude=["mlp.*", "lm_head"])
    kept = [path for path in PATHS if "mlp" not in path]
    assert report.excluded == [[*(p for p in sorted(PATHS) if "mlp" in p), HEAD]]
    before, after = deltas(adapter), deltas(out)
    assert sorted(after) == sorted(kept)
    assert all(np.array_equal(before[path], after[path]) for path in kept)
    assert not any("lm_head" in key for key in load_file(out / "adapter_model.safetensors"))
    config = config_of(out)
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert not config.get("modules_to_save")
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["exclude"] == ["mlp.*", "lm_head"]
    assert record["adapters"][0]["left_out"] == ["model.layers.{0-3}.mlp.up_proj", HEAD]
    assert [m.path for m in loratool.inspect(out).modules] == sorted(kept)


def test_what_a_dialect_has_no_place_for_can_be_left_out(tmp_path: Path) -> None:
    """A part that makes the conversion impossible is named, and without it the rest is written."""
    adapter = layered_lora(tmp_path / "adapter", saves_head=True)
    with pytest.raises(loratool.LoraToolError, match="lm_head"):
        loratool.convert(adapter, tmp_path / "no", to="mlx")
    with pytest.raises(UsageError, match="leave nothing"):
        loratool.convert(adapter, tmp_path / "no", to="mlx", exclude="*")
    loratool.convert(adapter, tmp_path / "out", to="mlx", exclude="lm_head")
    assert len(loratool.inspect(tmp_path / "out").modules) == len(PATHS)


def test_all_of_it_chosen_is_a_copy(tmp_path: Path) -> None:
    """Globs that leave nothing out change nothing."""
    adapter, out = layered_lora(tmp_path / "adapter"), tmp_path / "out"
    report = loratool.convert(adapter, out, include="model.*")
    assert report.excluded == [[]]
    name = "adapter_model.safetensors"
    before, after = load_file(adapter / name), load_file(out / name)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
