"""Bases of chosen values, and merges of them with an adapter of zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import loratool
from helpers.files import ADAPTED, NORM, OTHER, State, load, lora_on, random_of, write_base
from loratool.merging.report import MergeReport
from loratool.storage.tensors import BLOCK_ELEMENTS

TORCH = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip


def nothing(folder: Path, size: int = 8) -> Path:
    """An adapter whose product is exactly zero."""
    return lora_on(folder, np.zeros((size, 1)), np.zeros((1, size)))


def merge_state(
    tmp_path: Path, state: State, dtype: str, lora: Path | None = None
) -> tuple[State, MergeReport]:
    """Write `state` as a base, merge an adapter (by default one of zeros), read the result."""
    base = write_base(tmp_path / "base", state)
    lora = lora or nothing(tmp_path / "zero")
    report = loratool.merge(base, lora, tmp_path / "out", dtype=dtype)
    return load(tmp_path / "out"), report


def put(tensor: torch.Tensor, *values: float) -> torch.Tensor:
    """The tensor with its last elements set to `values`."""
    changed = tensor.clone()
    changed.view(-1)[-len(values) :] = torch.tensor(values, dtype=tensor.dtype)
    return changed


def legacy_buffers() -> State:
    """Constants that old checkpoints hold, as they hold them."""
    mask = torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4)
    return {
        "h.0.attn.masked_bias": torch.tensor(-torch.inf),
        "h.1.attn.masked_bias": torch.tensor(-1e9),
        "h.0.attn.bias": mask,
        "h.1.attn.bias": torch.where(mask > 0, 0.0, -torch.inf),
        "h.0.attn.attention.bias": mask.bool(),
        "h.2.attn.bias": mask.to(torch.uint8),
        "layers.0.attention.bias": mask * 1e-30,
        "layers.0.attention.masked_bias": torch.tensor(-1e9).half(),
        "layers.0.attention.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(8) / 8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1e-30, 0.3, 1e30]),
    }


def mixed() -> State:
    """A base that holds several dtypes, odd lengths, scalars and tensors without elements."""
    return {
        ADAPTED: random_of(torch.bfloat16, 8, 8),
        OTHER: random_of(torch.float16, 7, 3),
        NORM: random_of(torch.float32, 13),
        "model.double": random_of(torch.float64, 5, 1, 3),
        "model.scale": torch.tensor(0.7),
        "model.half-scale": torch.tensor(0.7).half(),
        "model.count": torch.tensor(7),
        "model.flag": torch.tensor([True, False, True]),
        "model.empty": torch.zeros(0, 4),
        "model.empty-half": torch.zeros(3, 0, 5).half(),
        "model.empty-ids": torch.zeros(0, dtype=torch.int64),
        "model.one": random_of(torch.bfloat16, 1),
        "model.bytes": random_of(torch.uint8, 3),
        "model.long": random_of(torch.float32, BLOCK_ELEMENTS * 2 + 1),
        "model.exact": random_of(torch.bfloat16, BLOCK_ELEMENTS),
    }
