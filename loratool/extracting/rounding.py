"""Do two tensors differ by no more than what storing them in their dtypes rounds off?

A fine-tune that is stored in another dtype than its base differs from it everywhere, also where
nothing was trained. Such a difference has full rank and means nothing. What is told here is proof,
not likelihood by size: a trained change may well be smaller than the rounding of its dtype.
"""

from __future__ import annotations

import math

import torch

from loratool.dtypes import FLOAT_FORMATS, FloatFormat
from loratool.merging.rounding import TORCH

#: Half precisions that weights may have gone through on their way to the dtype they are stored in.
_BETWEEN: tuple[tuple[str, ...], ...] = ((), ("BF16",), ("F16",))

#: How far the mean square of errors may be from that of rounding, 1/12 of the unit's square.
_SPREAD = 0.15
#: The same for few values, over the root of their number: four standard deviations of the mean.
_SPREAD_OF_FEW = 3.6
_LARGEST_SPREAD = 0.9


class RoundingTest:
    """Takes one block of both sides after the other. It has passed while all of them did.

    Either every tuned value is the base's, rounded to the tuned dtype, perhaps through a half
    precision. Or both sides may be roundings of one finer model: no value is off by more than half
    a unit of each dtype, and the errors are spread over the coarser unit as rounding spreads them.
    A trained change of small values is neither.
    """

    def __init__(self, base: str, tuned: str) -> None:
        self._ways = [(*way, tuned) for way in _BETWEEN if way != (tuned,)]
        self._sides = FLOAT_FORMATS[base], FLOAT_FORMATS[tuned]
        self._near = base != tuned
        self._count = 0
        self._squares = 0.0

    def take(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Values of the base and of the tuned model, widened to one dtype."""
        self._ways = [way for way in self._ways if torch.equal(_rounded(before, way), after)]
        self._near = self._near and self._is_near(before, after)

    @property
    def is_exact(self) -> bool:
        """Whether every tuned value so far is the base's, rounded."""
        return bool(self._ways)

    @property
    def passed(self) -> bool:
        if self.is_exact:
            return True
        if not self._near or not self._count:
            return False
        return abs(12 * self._squares / self._count - 1) <= enough_spread(self._count, _SPREAD)

    def _is_near(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether no value is further off than half a unit of each side; counts the errors."""
        base, tuned = (
            unit(values, form) for values, form in zip((before, after), self._sides, strict=True)
        )
        errors = (after - before).abs_()
        if bool((errors > (base + tuned) / 2).any()):
            return False
        coarse, fine = torch.maximum(base, tuned), torch.minimum(base, tuned)
        # Where the units are alike, as in float16's subnormal numbers, errors are spread otherwise.
        chosen = (coarse >= 4 * fine) & (before != 0)
        shares = (errors / coarse)[chosen]
        self._count += shares.numel()
        self._squares += float(torch.linalg.vector_norm(shares, dtype=torch.float64)) ** 2
        return True


def _rounded(values: torch.Tensor, way: tuple[str, ...]) -> torch.Tensor:
    stored = values
    for dtype in way:
        stored = stored.to(TORCH[dtype])
    return stored.to(values.dtype)


def enough_spread(count: int, usual: float) -> float:
    """How far the mean square of so many errors may be from what is expected, as a share of it."""
    return min(max(usual, _SPREAD_OF_FEW / math.sqrt(count)), _LARGEST_SPREAD)


def unit(values: torch.Tensor, form: FloatFormat) -> torch.Tensor:
    """The distance of each value to the next one of a format."""
    exponents = torch.frexp(values).exponent - 1
    exponents = torch.where(values == 0, form.smallest, exponents).clamp_(min=form.smallest)
    return torch.ldexp(torch.ones_like(values), exponents - form.fraction)
