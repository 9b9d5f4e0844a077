"""How large the delta of a module is, and in how many directions: from r × r matrices alone.

A stack of experts is measured expert by expert; its norm is that of all deltas together.
"""

from __future__ import annotations

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
    tells the scale or there are NaN and infinity (not `finite`); `zero_a` and `zero_b` say for each
    expert whether the factor is zero."""

    finite: bool
    values: npt.NDArray[np.float64] | None
    zero_a: npt.NDArray[np.bool_]
    zero_b: npt.NDArray[np.bool_]

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


def norms_of(module: Factors, files: FilePool) -> DeltaNorms | None:
    """Read a module's factors and measure them; None where there is no B and A."""
    grams = _grams_of(module, files)
    if grams is None:
        return None
    gram_b, gram_a = grams
    finite = bool(np.isfinite(gram_b).all() and np.isfinite(gram_a).all())
    values = None
    if finite and module.scale is not None:
        values = abs(module.scale) * singular_values(gram_b, gram_a)
        finite = bool(np.isfinite(np.sum(values**2)))
    zero_a, zero_b = (np.asarray(~part.any(axis=(1, 2))) for part in (gram_a, gram_b))
    return DeltaNorms(finite, values if finite else None, zero_a, zero_b)


def _grams_of(module: Factors, files: FilePool) -> tuple[_Grams, _Grams] | None:
    """`BᵀB` and `A·Aᵀ`, `[n, r, r]` for n experts."""
    if isinstance(module, ExpertStack):
        pairs = [
            _gram_pair(b, a)
            for _, bs, as_ in module.batches(files)
            for b, a in zip(bs, as_, strict=True)
        ]
    else:
        pair = module.left_right(files)
        if pair is None:
            return None
        pairs = [_gram_pair(*pair)]
    return np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs])


def _gram_pair(b: Matrix, a: Matrix) -> tuple[_Grams, _Grams]:
    return gram(b.T), gram(a)
