"""What verify says of stacks of experts: merged as asked, otherwise, in part, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stacked import EXPERTS, HIDDEN, INNER, LAYER, Stack, stacks, values, write_base
from safetensors.numpy import load_file, save_file

import loratool

KEY = f"{LAYER}.experts.gate_up_proj"


def made(folder: Path, count: int) -> tuple[Path, list[Path]]:
    base = write_base(folder / "base", {KEY: values(EXPERTS, 2 * INNER, HIDDEN)})
    return base, [stacks(folder / f"lora{i}", Stack(2 * INNER, HIDDEN), None) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_merge_as_asked(count: int, tmp_path: Path) -> None:
    base, loras = made(tmp_path, count)
    loratool.merge(base, loras, tmp_path / "out", dtype="bfloat16", verify=True)
    assert loratool.verify(tmp_path / "out", base, loras).verdict == "yes"


@pytest.mark.parametrize("weights", [[0.5], [1.0, 0.5], [1.0, 0.0]])
def test_a_merge_with_other_weights(weights: list[float], tmp_path: Path) -> None:
    """A stack has a delta for each expert; the weights of the adapters are told all the same, or
    at least that it is not what was asked."""
    base, loras = made(tmp_path, len(weights))
    loratool.merge(base, loras, tmp_path / "out", weights=weights, dtype="float32")
    report = loratool.verify(tmp_path / "out", base, loras)
    assert report.verdict == "no"
    if len(weights) == 1:
        assert report.findings[0].applied == pytest.approx(0.5, abs=1e-3)


def test_one_expert_that_is_damaged(tmp_path: Path) -> None:
    base, loras = made(tmp_path, 2)
    loratool.merge(base, loras, tmp_path / "out", dtype="float32")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors[KEY][1] += 0.3 * values(2 * INNER, HIDDEN)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    assert loratool.verify(tmp_path / "out", base, loras).verdict == "no"


def test_gate_and_up_the_wrong_way_round(tmp_path: Path) -> None:
    base, loras = made(tmp_path, 1)
    loratool.merge(base, loras, tmp_path / "out", dtype="float32")
    path = tmp_path / "out" / "model.safetensors"
    whole, before = load_file(path)[KEY], load_file(base / "model.safetensors")[KEY]
    delta = whole - before
    turned = np.concatenate([delta[:, INNER:], delta[:, :INNER]], axis=1)
    save_file({KEY: before + turned}, path)
    assert loratool.verify(tmp_path / "out", base, loras).verdict == "no"
