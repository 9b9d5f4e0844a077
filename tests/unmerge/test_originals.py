"""Originals that are at hand are copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import (
    ADAPTED,
    NORM,
    OTHER,
    load,
    lora_on,
    same,
    small_lora,
    small_state,
    write_base,
)
from helpers.outcomes import sha256s
from helpers.unmerging import all_kinds, all_kinds_lora, codes, no_unmerge

import loratool
from loratool.errors import LoraToolError, RestoreError


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_originals_are_copied(dtype: str, dora: bool, tmp_path: Path) -> None:
    """With the whole base at hand every tensor is the base's, and nothing is lost."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    lora_dir = all_kinds_lora(tmp_path / "lora", dora)
    loratool.merge(base, lora_dir, tmp_path / "out", dtype=dtype)
    report = loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back", base=base)
    assert report.copied_from_base == len(load(base))
    assert not report.expected_changed
    assert same(load(tmp_path / "back"), load(base))


def test_a_part_of_the_originals_is_copied(tmp_path: Path, lora_dir: Path) -> None:
    """One shard of the base gives its tensors; the others are subtracted."""
    state = small_state(dtype=torch.bfloat16)
    base = write_base(
        tmp_path / "base", {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER], NORM: state[NORM]}
    )
    both = [lora_dir, lora_on(tmp_path / "k", np.ones((8, 1)), np.ones((1, 8)), OTHER)]
    out = tmp_path / "out"
    loratool.merge(base, both, out, dtype="float32")
    for i, copied in enumerate(({ADAPTED}, {OTHER, NORM})):
        shard = base / f"model-0000{i + 1}-of-00002.safetensors"
        report = loratool.unmerge(out, both, tmp_path / f"back-{i}", base=shard)
        assert report.copied_from_base == len(copied)
        found = load(tmp_path / f"back-{i}")
        assert same({n: found[n] for n in copied}, {n: state[n] for n in copied})
        assert all(torch.allclose(found[n], state[n], atol=0.05) for n in state)


def test_other_originals_are_refused(tmp_path: Path, lora_dir: Path) -> None:
    """A base that does not give the merged tensors with these adapters is not copied from."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out")
    state = small_state()
    for name in (ADAPTED, NORM):
        changed = {**state, name: state[name] + 1}
        other = write_base(tmp_path / f"other-{name}", changed)
        no_unmerge(
            RestoreError, tmp_path / "out", lora_dir, tmp_path / "no", str(other), name, base=other
        )
    strange = write_base(tmp_path / "strange", {"x": torch.ones(3)})
    no_unmerge(LoraToolError, tmp_path / "out", lora_dir, tmp_path / "no", base=strange)


def test_originals_are_not_needed_with_an_undo_file(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """They are not read, and that is said."""
    base, adapters, out = two
    report = loratool.unmerge(out, adapters, tmp_path / "back", base=base)
    assert report.exact
    assert "base-not-needed" in codes(report)
    assert sha256s(tmp_path / "back") == sha256s(base)


def test_originals_must_give_the_merge_to_the_last_bit(tmp_path: Path) -> None:
    """A base that is almost the one is no original, where loratool's own record says that the
    merge comes out the same again."""
    state = small_state(64)
    base, lora = write_base(tmp_path / "base", state), small_lora(tmp_path / "lora", 64)
    loratool.merge(base, lora, tmp_path / "out")
    almost = {**state, ADAPTED: state[ADAPTED] * (1 + 2e-5)}
    assert loratool.verify(tmp_path / "out", write_base(tmp_path / "b", almost), lora).equal < 1
    other = write_base(tmp_path / "other", almost)
    with pytest.raises(loratool.LoraToolError, match="give those of"):
        loratool.unmerge(tmp_path / "out", lora, tmp_path / "back", base=other)
    report = loratool.unmerge(tmp_path / "out", lora, tmp_path / "back", base=base)
    assert report.exact
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
