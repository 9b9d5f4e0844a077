"""A dry run of merge prints the plan, and refuses what the merge would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.cli import run_cli

import loratool
from loratool.errors import LoraToolError, ValueRangeError


def test_dry_run_prints_the_plan(base: Path, adapter: Path, tmp_path: Path) -> None:
    """--dry-run says what would be merged and written, and how much room there is."""
    done = run_cli("merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run")
    for words in ("nothing was written", "28 merged, 11 cast", "to read", "to write", "free"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


TRAINED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "integers in the place of a weight": (
        {"base_model.model.lm_head.weight": np.ones((8, 5), np.int8)},
        {"modules_to_save": ["lm_head"]}),
    "the same token twice": (
        {"base_model.model.lm_head.token_adapter.trainable_tokens_delta":
         np.ones((2, 5), np.float32)}, {"trainable_token_indices": {"lm_head": [7, 7]}}),
    "a stray tensor beside modules_to_save as a string": (
        {"base_model.model.layers.0.typo.weight": np.ones((3, 3), np.float32)},
        {"modules_to_save": "score"}),
    "factors of integers": (
        {f"base_model.model.{Q}.lora_B.weight": np.ones((6, 4), np.int8)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_refused_when_planning(name: str, tmp_path: Path) -> None:
    """What would be lost or misread is refused, by --dry-run already."""
    base = small_base(tmp_path / "base", **{"lm_head.weight": np.ones((8, 5), np.float16)})
    extra, config = TRAINED[name]
    adapter = write_adapter(tmp_path / "adapter", {**pair(Q, 6, 5), **extra}, config)
    with pytest.raises(LoraToolError):
        loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    loratool.inspect(adapter, base=base)


def test_dry_run_looks_for_nan(tmp_path: Path) -> None:
    """A plan that the merge would refuse for NaN in the adapter is refused at once."""
    tensors = {k: np.full_like(v, np.nan) for k, v in pair(Q, 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    with pytest.raises(ValueRangeError, match="2 tensors hold NaN"):
        loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out", dry_run=True)
