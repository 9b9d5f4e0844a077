"""Large matrices of known singular values, read in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from loratool.linalg.truncation import ChooseRank, Truncation, truncated

SHAPES = {"square": (330, 330), "wide": (300, 520), "tall": (520, 300)}

#: Singular values of a matrix with `n` of them, largest first.
SPECTRA: dict[str, Callable[[int], Any]] = {
    "power 0.5": lambda n: np.arange(1, n + 1) ** -0.5,
    "power 1": lambda n: np.arange(1, n + 1) ** -1.0,
    "power 2": lambda n: np.arange(1, n + 1) ** -2.0,
    "power 3": lambda n: np.arange(1, n + 1) ** -3.0,
    "flat": lambda n: np.ones(n),
    "slowly falling": lambda n: 1 - 0.5 * np.arange(n) / n,
    "low rank": lambda n: np.linspace(2, 1, 10),
    "step": lambda n: np.where(np.arange(n) < 20, 1.0, 0.1),
}
#: A few large singular values over a random bulk, whose largest is the unit.
OVER_NOISE: dict[str, Any] = {
    "gaussian": np.zeros(0),
    "outlier 1e3": np.array([1e3]),
    "outlier 3e4": np.array([3e4]),
    "low rank and noise": np.linspace(8, 3, 10),
}


class Blocks:
    """A matrix that can only be read in blocks, and counts how often it was."""

    def __init__(self, dense: np.ndarray, rows: int = 64) -> None:
        self.rows, self.columns = dense.shape
        self.device = torch.device("cpu")
        self.held: torch.Tensor | None = None
        self.reads = 0
        self._dense = torch.from_numpy(dense)
        self._size = rows

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.reads += 1
        buffer = torch.empty(self._size, self.columns)
        for low in range(0, self.rows, self._size):
            own = self._dense[low : low + self._size]
            block = buffer[: len(own)]
            yield low, block.copy_(own)
            buffer.fill_(math.nan)  # valid until the next one


@dataclass(frozen=True)
class Dense:
    """A float32 matrix, its singular values and ‖D‖², in float64."""

    matrix: np.ndarray
    values: np.ndarray
    energy: float

    def least(self, rank: int) -> float:
        return float(np.sum(self.values[rank:] ** 2))

    def truncated(self, rank: int, rows: int = 64, **options: Any) -> Truncation:
        return truncated(Blocks(self.matrix, rows), self.energy, fixed(rank), rank, **options)


def fixed(rank: int) -> ChooseRank:
    return lambda values, _: min(rank, len(values))


def known(matrix: np.ndarray) -> Dense:
    wide = matrix.astype(np.float64)
    return Dense(matrix, np.linalg.svd(wide, compute_uv=False), float(np.sum(wide**2)))


def directed(values: Any, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A float64 matrix with these singular values, in random directions."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return np.asarray((left * values) @ right.T)


@cache
def matrix(kind: str, shape: tuple[int, int]) -> Dense:
    if kind in SPECTRA:
        return known(directed(SPECTRA[kind](min(shape)), *shape).astype(np.float32))
    noise = np.random.default_rng(1).standard_normal(shape) / (
        math.sqrt(shape[0]) + shape[1] ** 0.5
    )
    large = OVER_NOISE[kind]
    return known((noise + directed(large, *shape) if len(large) else noise).astype(np.float32))


@cache
def approximation(kind: str, shape: tuple[int, int], rank: int) -> Truncation:
    return matrix(kind, shape).truncated(rank)


def true_cut(dense: Dense, found: Truncation) -> float:
    product = found.left.double().numpy() @ found.right.double().numpy().T
    return float(np.sum((dense.matrix - product) ** 2))
