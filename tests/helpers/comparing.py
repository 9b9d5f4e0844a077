"""Adapters with given factors, and comparisons that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool
from helpers.adapters import PREFIX, WEIGHTS, Tensors, write_adapter
from helpers.outcomes import assert_clear
from loratool.errors import LoraToolError


def of(folder: Path, modules: dict[str, tuple[Any, Any]], **config: Any) -> Path:
    """An adapter with these `(B, A)`, scale 1."""
    tensors: Tensors = {}
    rank = 0
    for path, (b, a) in modules.items():
        rank = len(a)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": np.asarray(a, np.float32),
                    f"{PREFIX}{path}.lora_B.weight": np.asarray(b, np.float32)}  # fmt: skip
    return write_adapter(folder, tensors, {"r": rank, "lora_alpha": rank, **config})


def changed(source: Path, target: Path, extra: Tensors, **config: Any) -> Path:
    """A copy of an adapter with some tensors and config fields put in."""
    old = json.loads((source / "adapter_config.json").read_text())
    return write_adapter(target, load_file(source / WEIGHTS) | extra, {**old, **config})


def fails(kind: type[LoraToolError], adapters: Any, *parts: str, **options: Any) -> LoraToolError:
    """Compare, expecting this clear error with `parts` in its message."""
    with pytest.raises(LoraToolError) as caught:
        loratool.compare(adapters, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    return caught.value


def units(*numbers: int, size: int = 10) -> np.ndarray:
    """Unit vectors as columns."""
    return np.eye(size)[:, list(numbers)]
