"""Pairs of factors of all kinds of shapes and conditions."""

from __future__ import annotations

from typing import Any

import numpy as np

#: What is cut off as negligible: half a unit in the last place of float32.
NEGLIGIBLE = 2.0**-24

#: out, in, rank. The last ones are longer than the slices in which rows are summed.
SHAPES = {
    "square": (24, 24, 4),
    "wide": (12, 40, 5),
    "tall": (40, 12, 5),
    "rank 1": (15, 20, 1),
    "rank above width": (20, 6, 9),
    "rank above both": (6, 9, 14),
    "one row": (1, 5, 3),
    "one column": (5, 1, 3),
    "long b": (2100, 7, 3),
    "long a": (7, 2100, 3),
}


def draw(out: int, width: int, rank: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((out, rank)).astype(dtype),
        rng.standard_normal((rank, width)).astype(dtype),
    )


def product(b: np.ndarray, a: np.ndarray, scale: Any = 1.0) -> np.ndarray:
    return (b.astype(np.float64) * scale) @ a.astype(np.float64)


def conditioned(rows: int, columns: int, condition: float, seed: int) -> np.ndarray:
    """A matrix with singular values from 1 down to 1/condition, in random directions."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return (left * np.geomspace(1, 1 / condition, columns)) @ right.T
