"""Tensors and files that are missing, more, of another shape or cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.files import ADAPTED, NORM, load, small_lora, small_state, write_base
from helpers.outcomes import assert_clear
from helpers.places import FIXTURES
from helpers.verifying import UNTOUCHED, K, Q, bad, check, finding, merged, said_by, written

import loratool
from loratool.errors import LoraToolError


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    """A tensor that is not there is missing, adapted or not."""
    state = merged()
    del state[Q], state[UNTOUCHED]
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {Q: "missing", UNTOUCHED: "missing"}
    assert report.summary[0].startswith("2 tensors are missing: ")
    assert Q in report.summary[0]
    assert UNTOUCHED in report.summary[0]


def test_added_tensors_are_named(tmp_path: Path) -> None:
    """A tensor that the base does not have is named."""
    report = check(tmp_path / "m", {**merged(), "model.extra.weight": torch.zeros(3)})
    assert report.verdict == "no"
    assert bad(report) == {"model.extra.weight": "added"}
    assert report.summary[0] == "1 tensor is not in the base: model.extra.weight"


@pytest.mark.parametrize("tensor", [Q, K, UNTOUCHED])
def test_tensors_of_another_shape_are_named(tensor: str, tmp_path: Path) -> None:
    """A tensor with another shape is named with both shapes, even with as many elements."""
    state = merged()
    rows, columns = state[tensor].shape
    state[tensor] = state[tensor].reshape(rows // 2, columns * 2)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {tensor: "shape"}
    note = f"{[rows // 2, columns * 2]} instead of {[rows, columns]}"
    assert finding(report, tensor).note == note
    assert report.summary[0] == f"1 tensor has another shape: {tensor}"


def test_integers_in_place_of_floats_are_named(tmp_path: Path) -> None:
    """A float tensor that became integers cannot hold the result, and one sentence says it."""
    base = write_base(tmp_path / "base", {**small_state(16), "model.bias": torch.ones(16)})
    adapter = small_lora(tmp_path / "a", 16)
    loratool.merge(base, adapter, tmp_path / "out")
    state = {**load(tmp_path / "out"), "model.bias": torch.ones(16, dtype=torch.int32)}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == {"model.bias": "dtype"}
    assert report.summary[0] == "1 tensor has a dtype that cannot hold it: model.bias"


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_shard_is_no_merge(cut: int, tmp_path: Path) -> None:
    """A shard that ends early is exit 3, the verdict no, and the reason names the file."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-cut])
    report = loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "no"
    assert shard.name in " ".join(report.summary)
    said = said_by(out, columns=200)
    assert said.exit_code == 3
    assert str(shard) in said.stdout
    assert ".." not in said.stdout


def test_sentence_that_begins_with_a_path_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The path of a truncated file is printed as it is, without a capital put into it."""
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    said = said_by(Path("out"), columns=200)
    assert f"out/{shard.name}" in said.stdout
    assert "Out/" not in said.stdout


def test_missing_shard_is_no_yes(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is never a yes."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LoraToolError) as caught:
        loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert_clear(caught.value, shard.name)
    assert caught.value.exit_code == 1


def test_norm_of_a_small_base_is_untouched(tmp_path: Path) -> None:
    """Tensors that no adapter touches are counted, not listed, while they are as in the base."""
    base = write_base(tmp_path / "base", small_state(16))
    adapter = small_lora(tmp_path / "a", 16)
    loratool.merge(base, adapter, tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert [f.tensor for f in report.findings] == [ADAPTED]
    assert (report.untouched, report.tensors) == (2, 3)
    state = {**load(tmp_path / "out"), NORM: load(tmp_path / "out")[NORM] + 1}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == {NORM: "changed"}
