"""Merged and unmerged again and again, one merge on top of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from helpers.files import lora_on, small_state, write_base
from helpers.outcomes import sha256s
from helpers.unmerging import UNDO, all_kinds, all_kinds_lora, comes_back, no_unmerge

import loratool
from loratool.errors import RestoreError


def test_fifty_cycles_change_nothing(tmp_path: Path) -> None:
    """After fifty merges and unmerges, with changing dtypes and weights, every file has the
    sha256 it had."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    adapters = [all_kinds_lora(tmp_path / "one", False), all_kinds_lora(tmp_path / "two", True)]
    wanted, now = sha256s(base), base
    dtypes = ["float16", "bfloat16", "float32", "base"]
    for turn in range(50):
        out, back = tmp_path / "out", tmp_path / f"back-{turn}"
        loratool.merge(
            now, adapters, out, weights=[1.0 - turn / 20, 0.5], dtype=dtypes[turn % 4],
            reversible=True, overwrite=turn > 0,
        )  # fmt: skip
        loratool.unmerge(out, adapters, back)
        assert sha256s(back) == wanted
        now = back


def test_a_merge_on_top_of_a_merge_is_taken_back_step_by_step(tmp_path: Path) -> None:
    """The model between comes back with its own record and undo file, so that its base does."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    one, two = all_kinds_lora(tmp_path / "one", False), all_kinds_lora(tmp_path / "two", True)
    three = all_kinds_lora(tmp_path / "three", False)
    steps = [base]
    for i, lora_dir in enumerate((one, two, three)):
        loratool.merge(
            steps[-1], lora_dir, tmp_path / f"m{i}", weights=[0.5 + i],
            dtype=["float16", "bfloat16", "float16"][i], reversible=True,
            again=True,  # the third is the first, once more
        )  # fmt: skip
        steps.append(tmp_path / f"m{i}")
    no_unmerge(RestoreError, steps[2], one, tmp_path / "no", "merged earlier")
    no_unmerge(RestoreError, steps[2], [one, two], tmp_path / "no", "merged earlier")
    now = steps[-1]
    for i, lora_dir in ((2, three), (1, two), (0, one)):
        loratool.unmerge(now, lora_dir, tmp_path / f"back-{i}")
        assert sha256s(tmp_path / f"back-{i}") == sha256s(steps[i])
        now = tmp_path / f"back-{i}"


def test_a_reversible_merge_on_a_plain_one_keeps_its_record(tmp_path: Path, lora_dir: Path) -> None:
    """A base that was merged for good comes back with its loratool.json."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "merged")
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    comes_back(tmp_path / "merged", other, tmp_path / "x")
    assert (tmp_path / "x" / "back" / "loratool.json").is_file()


def test_a_plain_merge_on_a_reversible_one_cannot_be_taken_for_it(
    tmp_path: Path, lora_dir: Path
) -> None:
    """The undo file of an earlier merge does not go along where it no longer fits."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "one", reversible=True)
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(tmp_path / "one", other, tmp_path / "two")
    assert not (tmp_path / "two" / UNDO).exists()
    assert not loratool.unmerge(tmp_path / "two", other, tmp_path / "back").exact
