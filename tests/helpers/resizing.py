"""Adapters of known singular values, and resizes that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from helpers.adapters import PREFIX, Tensors, deltas, write_adapter
from helpers.outcomes import assert_clean, assert_clear
from loratool.errors import LoraToolError


def of_spectrum(folder: Path, *spectra: list[float]) -> Path:
    """An adapter whose modules have these singular values (at most 10), scale 2."""
    tensors: Tensors = {}
    rank = max(map(len, spectra))
    for number, values in enumerate(spectra):
        rng = np.random.default_rng(number)
        left = np.linalg.qr(rng.standard_normal((12, 10)))[0][:, : len(values)]
        right = np.linalg.qr(rng.standard_normal((10, 10)))[0][:, : len(values)]
        path = f"{PREFIX}model.layers.{number}.q_proj"
        a, b = np.zeros((rank, 10)), np.zeros((12, rank))
        a[: len(values)] = (right * np.asarray(values) / 2).T
        b[:, : len(values)] = left
        tensors |= {f"{path}.lora_A.weight": a.astype(np.float32),
                    f"{path}.lora_B.weight": b.astype(np.float32)}  # fmt: skip
    return write_adapter(folder, tensors, {"r": rank, "lora_alpha": 2 * rank})


def assert_near(one: Path, other: Path, share: float = 1e-6) -> None:
    """Both adapters have the same modules, and each does the same in both."""
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for path, delta in first.items():
        assert np.linalg.norm(delta - second[path]) <= share * np.linalg.norm(delta)


def fails(
    kind: type[LoraToolError], source: Any, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Resize, expecting this clear error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.resize(source, output, **{"rank": 2, **options})
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value
