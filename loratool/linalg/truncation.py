"""The best low-rank approximation of a large matrix: which method, when it is good enough.

Small matrices, and ranks that are a large part of the matrix, get the full decomposition: all
eigenvalues of the Gram matrix, in float64. The others get a block Krylov space that grows until the
rank's share of the energy has stopped growing. How much the best approximation could hold at most
is bounded afterwards, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from loratool.linalg.krylov import BlockKrylov, Matrix
from loratool.linalg.lowrank import NEGLIGIBLE, Float64

#: How many singular values to keep, of those found and the ‖D‖² they are part of.
ChooseRank = Callable[[Float64, float], int]

#: What is still expected to come may be this share of what is cut off: errors are then within a
#: thousandth of the best possible.
_SETTLED = 1.5e-3

#: Where less than this share of the energy is cut off, the sum of squares in float32 cannot tell
#: how much, and the difference is measured element by element.
_MEASURED = 1e-3

#: Below this share the gain of a step drowns in rounding, so the search ends after so many steps.
_DROWNED, _ENOUGH = 1e-5, 7

#: The least ratio of one step's gain to the one before that is believed.
_SLOW = 0.35

#: What rounding may add to a sum of squares, as a share of it.
_ROUNDING = 3e-7

#: Blocks of a Krylov space: more than flat spectra need.
_STEPS = 16


@dataclass(frozen=True)
class Truncation:
    """`left·rightᵀ`, the best approximation found of its rank, with the factors balanced by √σ.

    `left [rows, k]`, `right [columns, k]`, float32; `values [k]` are their singular values, and
    `following` those found beyond. `energy` is ‖D‖², `cut` is ‖D - left·rightᵀ‖², and no
    approximation of this rank has less than `least`. `passes` over the matrix, 0 for the full
    decomposition.
    """

    left: torch.Tensor
    right: torch.Tensor
    values: Float64
    following: Float64
    energy: float
    cut: float
    least: float
    passes: int


#: The rank to begin with where none is known.
_FIRST = 32


def truncated(
    matrix: Matrix,
    energy: float,
    choose: ChooseRank,
    cap: int | None = None,
    seed: int = 0,
    exact: bool = False,
    first: int | None = None,
) -> Truncation:
    """Approximate `matrix`, with ‖D‖² = `energy`, by the rank that `choose` picks.

    `cap` is the largest rank it will pick, if that is known, and `first` the one to begin with, by
    default the cap. The result depends on the seed only where the full decomposition is too
    expensive.
    """
    limit = min(matrix.rows, matrix.columns)
    size = min(first or cap or _FIRST, limit)
    size += max(8, size // 4)
    if not exact and 8 * size <= limit:
        generator = torch.Generator().manual_seed(seed)
        space = BlockKrylov(matrix, size, generator)
        rank = _settle(space, energy, choose, cap)
        if rank:
            return _from_space(space, rank, energy, generator)
    return _in_full(matrix, choose)


def _settle(space: BlockKrylov, energy: float, choose: ChooseRank, cap: int | None) -> int:
    """Let the space grow until the chosen rank is settled. 0 where it would grow too large."""
    limit = min(space.matrix.rows, space.matrix.columns)
    held: list[Float64] = []
    while space.steps < _STEPS:
        space.step()
        squares = space.squares.numpy()
        held.append(squares)
        rank = choose(squares**0.5, energy)
        # A choice by energy takes all there is where that is not enough.
        open_ended = rank == len(squares) and rank != cap
        recent = [float(s[:rank].sum()) for s in held[-3:]]
        if not open_ended and len(recent) == 3 and _is_settled(recent, energy, space.steps):
            return rank
        if 2 * (space.width + space.size) > limit or (open_ended and space.steps >= 3):
            return 0
    return rank


def _is_settled(held: list[float], energy: float, steps: int) -> bool:
    """Whether the energies that the last three steps held go on to less than is worth a step.

    What is still to come is extrapolated as a geometric series, and doubled.
    """
    left = energy - held[2]
    if left <= _DROWNED * energy:
        return steps >= _ENOUGH
    gain, earlier = max(held[2] - held[1], 0.0), max(held[1] - held[0], 1e-300)
    # What a step found of a few large values says nothing of the many small ones to come.
    ratio = min(max(gain / earlier, _SLOW), 0.95)
    return 2 * gain * ratio / (1 - ratio) <= _SETTLED * left


def _from_space(
    space: BlockKrylov, rank: int, energy: float, generator: torch.Generator
) -> Truncation:
    squares = space.squares.numpy()
    left, right = space.factors(rank)
    passes = space.steps
    cut = max(energy - float(squares[:rank].sum()), 0.0)
    least = 0.0
    if cut > _ROUNDING * energy:
        least = energy * (1 - _ROUNDING) - space.bound(rank, energy, generator)
    if cut < _MEASURED * energy:
        cut = _difference(space.matrix, left, right)
    values = squares[: max(space.size, rank)] ** 0.5
    return Truncation(
        left, right, values[:rank], values[rank:], energy, cut, min(max(least, 0.0), cut), passes
    )


def _difference(matrix: Matrix, left: torch.Tensor, right: torch.Tensor) -> float:
    """‖D - left·rightᵀ‖², summed over the elements."""
    total = 0.0
    for low, block in matrix.blocks():
        rest = torch.addmm(block, left[low : low + len(block)], right.T, alpha=-1)
        total += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
    return total


def _in_full(matrix: Matrix, choose: ChooseRank) -> Truncation:
    """By the eigenvalues of DᵀD, or of DDᵀ where that is smaller."""
    if matrix.rows >= matrix.columns:
        gram = torch.zeros(matrix.columns, matrix.columns, dtype=torch.float64)
        gram = gram.to(matrix.device)
        for _, block in matrix.blocks():
            wide = block.double()
            gram.addmm_(wide.T, wide)
        whole = None
    else:
        whole = matrix.held
        if whole is None:
            whole = torch.empty(matrix.rows, matrix.columns, device=matrix.device)
            for low, block in matrix.blocks():
                whole[low : low + len(block)] = block
        gram = torch.zeros(matrix.rows, matrix.rows, dtype=torch.float64, device=matrix.device)
        for columns in _slices(whole):
            wide = columns.double()
            gram.addmm_(wide, wide.T)
    energy = float(torch.trace(gram))
    found, vectors = torch.linalg.eigh(gram)
    squares = found.flip(0).clamp(min=0.0).cpu().numpy()
    # The noise of the Gram matrix is 1e-16 of its norm, and so 1e-8 of the singular values.
    squares = squares[squares > max(NEGLIGIBLE, 1e-7) ** 2 * squares[0]]
    values = squares**0.5
    rank = choose(values, energy)
    kept = vectors.flip(1)[:, :rank]
    root = torch.from_numpy(values[:rank].copy()).to(matrix.device).sqrt()
    near = (kept * root).float()
    if whole is None:
        far = torch.empty(matrix.rows, rank, device=matrix.device)
        for low, block in matrix.blocks():
            far[low : low + len(block)] = ((block.double() @ kept) / root).float()
        left, right = far, near
    else:
        parts = [(columns.double().T @ kept) / root for columns in _slices(whole)]
        left, right = near, torch.cat(parts).float()
    cut = math.fsum(float(s) for s in squares[rank:])
    cut = max(energy - float(squares[:rank].sum()), cut)
    return Truncation(left, right, values[:rank], values[rank:], energy, cut, cut, 0)


def _slices(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    return (whole[:, low : low + _COLUMNS] for low in range(0, whole.shape[1], _COLUMNS))


#: Columns that are widened to float64 at a time.
_COLUMNS = 1024
