"""How large the delta of a module is, and in how many directions: from r × r matrices alone.

A stack of experts is measured expert by expert; its norm is that of all deltas together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors, Matrix
from loratool.linalg.spectrum import gram, singular_values
from loratool.storage.tensors import FilePool

_Grams = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DeltaNorms:
    """Of scale·B·A. `values` are its singular values, `[n, r]` for n experts, None where no config
    tells the scale or there are NaN and infinity (not `finite`); `unscaled` are those of B·A.
    `zero_a` and `zero_b` say for each expert whether the factor is zero."""

    finite: bool
    values: npt.NDArray[np.float64] | None
    zero_a: npt.NDArray[np.bool_]
    zero_b: npt.NDArray[np.bool_]
    unscaled: npt.NDArray[np.float64]

    @property
    def idle(self) -> str:
        """The factor that is zero, "A" or "B", if the module has no effect; else ""."""
        if not (self.zero_a | self.zero_b).all():
            return ""
        return "B" if self.zero_b.any() else "A"

    @property
    def dead(self) -> int:
        """How many experts have no effect."""
        return int(np.count_nonzero(self.zero_a | self.zero_b))


def norms_of(modules: Sequence[Factors], files: FilePool) -> list[DeltaNorms | None]:
    """Read the factors of modules and measure each; None where there is no B and A."""
    grams = [_grams_of(module, files) for module in modules]
    values = _singular_values([pair for pair in grams if pair is not None])
    return [
        None if pair is None else _norms(module.scale, pair, next(values))
        for module, pair in zip(modules, grams, strict=True)
    ]


def _norms(scale: float | None, grams: tuple[_Grams, _Grams], unscaled: _Grams) -> DeltaNorms:
    gram_b, gram_a = grams
    finite = bool(np.isfinite(gram_b).all() and np.isfinite(gram_a).all())
    values = None
    if finite and scale is not None:
        values = abs(scale) * unscaled
        finite = bool(np.isfinite(np.sum(values**2)))
    zero_a, zero_b = (np.asarray(~part.any(axis=(1, 2))) for part in (gram_a, gram_b))
    return DeltaNorms(finite, values if finite else None, zero_a, zero_b, unscaled)


def _singular_values(pairs: Sequence[tuple[_Grams, _Grams]]) -> Iterator[_Grams]:
    """Those of each pair, `[n, r]`: all of one rank together, which are many small ones mostly."""
    found: dict[int, _Grams] = {}
    of_rank: dict[int, list[int]] = defaultdict(list)
    for number, (gram_b, _) in enumerate(pairs):
        of_rank[gram_b.shape[-1]].append(number)
    for numbers in of_rank.values():
        gram_b, gram_a = (np.concatenate([pairs[n][side] for n in numbers]) for side in (0, 1))
        for part in (gram_b, gram_a):
            part[~np.isfinite(part)] = 0.0  # nothing is said of those
        ends = np.cumsum([len(pairs[n][0]) for n in numbers])[:-1]
        found |= zip(numbers, np.split(singular_values(gram_b, gram_a), ends), strict=True)
    return (found[number] for number in range(len(pairs)))


def _grams_of(module: Factors, files: FilePool) -> tuple[_Grams, _Grams] | None:
    """`BᵀB` and `A·Aᵀ`, `[n, r, r]` for n experts."""
    if isinstance(module, ExpertStack):
        pairs = [
            _gram_pair(b, a)
            for _, bs, as_ in module.batches(files)
            for b, a in zip(bs, as_, strict=True)
        ]
        return np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs])
    pair = module.left_right(files)
    if pair is None:
        return None
    gram_b, gram_a = _gram_pair(*pair)
    return gram_b[None], gram_a[None]


def _gram_pair(b: Matrix, a: Matrix) -> tuple[_Grams, _Grams]:
    return gram(b.T), gram(a)
