"""Adapters to combine, their weighted sum in dense matrices, and combines that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from helpers.adapters import HEAD, deltas, lora
from helpers.outcomes import assert_clean, assert_clear
from loratool.errors import LoraToolError


def holding(folder: Path, head: np.ndarray, seed: int = 0, **config: Any) -> Path:
    """An adapter that holds a head whole."""
    extra = {HEAD: head}
    return lora(folder, seed=seed, extra=extra, modules_to_save=["score"], **config)


def total(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    """The weighted sum of the dense deltas."""
    found: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, delta in deltas(folder).items():
            found[path] = found.get(path, 0.0) + weight * delta
    return found


def assert_near(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], size: float, share: float = 1e-6
) -> None:
    """The same modules, whose deltas differ by no more than this share of `size`."""
    assert one.keys() == other.keys()
    for path in one:
        assert np.linalg.norm(one[path] - other[path]) <= share * size


def fails(
    kind: type[LoraToolError], adapters: Any, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Combine, expecting this clear error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.combine(adapters, output, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value
