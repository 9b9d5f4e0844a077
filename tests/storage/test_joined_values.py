"""Tensors that are put together from others: one after the other, and row by row in turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratool.storage.composed import alternating, joined
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_float32, values_of


def made(folder: Path, *shapes: tuple[int, int]) -> tuple[list[TensorInfo], list[np.ndarray]]:
    values = {
        str(i): np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        for i, shape in enumerate(shapes)
    }
    save_file(values, folder / "x.safetensors")
    tensors, _ = read_header(folder / "x.safetensors")
    return [tensors[name] for name in values], list(values.values())


@pytest.mark.parametrize("turns", [False, True])
def test_any_range_of_what_is_put_together(turns: bool, tmp_path: Path) -> None:
    """Every run of elements is that of the whole, wherever it begins and ends."""
    infos, values = made(tmp_path, (3, 4), (3, 4))
    if turns:
        whole = np.stack(values, axis=1).reshape(6, 4)
        info = alternating("w", (6, 4), infos)
    else:
        whole = np.concatenate(values)
        info = joined("w", (6, 4), infos)
    assert np.array_equal(read_float32(info), whole)
    with FilePool() as files:
        found = values_of(info, files)
        for low in range(24):
            for high in range(low, 25):
                assert np.array_equal(found.floats(low, high), whole.reshape(-1)[low:high])


def test_parts_of_unequal_lengths(tmp_path: Path) -> None:
    infos, values = made(tmp_path, (1, 4), (5, 4), (2, 4))
    found = read_float32(joined("w", (8, 4), infos))
    assert np.array_equal(found, np.concatenate(values))
