"""Reversible merges and taking them back: the base comes back, or a clear error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratool
from helpers.adapters import write_adapter
from helpers.files import ADAPTED, NORM, OTHER, State, load, random_of, same
from helpers.outcomes import assert_clean, assert_clear, sha256s
from helpers.states import legacy_buffers
from loratool.errors import LoraToolError
from loratool.verbs.unmerging import UnmergeReport

#: In a merged model.
UNDO = Path("loratool") / "undo.safetensors"
TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

Adapters = Path | list[Path]


def comes_back(base: Path, adapters: Adapters, folder: Path, **options: Any) -> UnmergeReport:
    """Merge reversibly into folder/out and unmerge into folder/back: every file of the base is
    there as it was, and nothing else; the merge did change the weights."""
    out, back = folder / "out", folder / "back"
    loratool.merge(base, adapters, out, reversible=True, **options)
    report = loratool.unmerge(out, adapters, back)
    assert report.exact
    assert sha256s(back) == sha256s(base)
    assert not same(load(out), load(base))
    return report


def no_unmerge(
    kind: type[LoraToolError], merged: Path, adapters: Adapters, back: Path, *parts: str,
    **options: Any,
) -> LoraToolError:  # fmt: skip
    """Unmerge, expecting this error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.unmerge(merged, adapters, back, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(back)
    return caught.value


def right_or_refused(merged: Path, adapters: Adapters, back: Path, base: Path) -> bool:
    """Unmerge: True if the base comes back; else there is a clear error and no output."""
    try:
        loratool.unmerge(merged, adapters, back)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
        return False
    assert sha256s(back) == sha256s(base)
    shutil.rmtree(back)
    return True


def codes(report: Any) -> set[str]:
    return {notice.code for notice in report.warnings}


def all_kinds(dtype: torch.dtype) -> State:
    """A base of one dtype with weights for every way a block is computed, and what is carried
    over beside them."""
    return {
        ADAPTED: random_of(dtype, 24, 40, seed=1),
        OTHER: random_of(dtype, 40, 24, seed=2),
        "model.embed_tokens.weight": random_of(dtype, 30, 24, seed=3),
        "model.conv.weight": random_of(dtype, 6, 4, 3, 2, seed=4),
        NORM: random_of(dtype, 1001, seed=5),
        "model.scalar": random_of(dtype, seed=6),
        "model.empty": torch.zeros(0, 5, dtype=dtype),
        "model.ids": torch.arange(9),
        **legacy_buffers(),
    }


def all_kinds_lora(folder: Path, dora: bool) -> Path:
    rng = np.random.default_rng(8 + dora)
    shapes = {
        "layers.0.self_attn.q_proj.lora_A.weight": (3, 40),
        "layers.0.self_attn.q_proj.lora_B.weight": (24, 3),
        "layers.0.self_attn.k_proj.lora_A.weight": (3, 24),
        "layers.0.self_attn.k_proj.lora_B.weight": (40, 3),
        "embed_tokens.lora_embedding_A": (3, 30),
        "embed_tokens.lora_embedding_B": (24, 3),
        "conv.lora_A.weight": (3, 4, 3, 2),
        "conv.lora_B.weight": (6, 3, 1, 1),
    }
    tensors = {
        f"base_model.model.model.{key}": (rng.standard_normal(shape) * 0.2).astype(np.float32)
        for key, shape in shapes.items()
    }
    if dora:
        counts = {"layers.0.self_attn.q_proj": 24, "layers.0.self_attn.k_proj": 40,
                  "embed_tokens": 24, "conv": 6}  # fmt: skip
        for path, count in counts.items():
            shape = (1, count, 1, 1) if path == "conv" else (count,)
            key = f"base_model.model.model.{path}.lora_magnitude_vector"
            tensors[key] = rng.uniform(0.5, 9, shape).astype(np.float32)
    return write_adapter(folder, tensors, {"r": 3, "lora_alpha": 4, "use_dora": dora})
