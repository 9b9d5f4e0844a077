"""Do two tensors differ by no more than what quantising rounds off; how much of it is that?

A quantised value stands for all numbers between two ends (`models.quantised.ends`). A fine-tune of
the 16-bit original differs from a quantised base everywhere by what quantising rounded off, also
where nothing was trained: 9 % of the weights' norm in 4 bits. As for dtypes (`rounding`), what is
left out is proved, value by value; a trained change that is smaller is not taken for noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loratool.dtypes import FLOAT_FORMATS
from loratool.extracting.rounding import enough_spread, unit
from loratool.models.quantised.ends import schemes_of
from loratool.storage.tensors import TensorInfo

#: How far ends may be off, as a share of themselves: half a unit of bfloat16, which models are
#: stored in and libraries divide in before they round.
_BLUR = 2.0**-8

#: Between these the mean square of errors is that of rounding, 1, where one side is quantised. What
#: was made from the quantised values themselves is far below. Where both are, half of it is less.
_SPREAD_OF_ONE = (0.6, 1.35)
_SPREAD_OF_BOTH = 0.15

#: Where one side tells numbers so much more finely, what it rounds off itself is of no account.
_FINER = 4

#: How much the width of what values stand for has to vary within rows to explain anything.
_LEAST_VARIATION = 0.05

#: Lower and upper ends of what the values of a block stand for.
Ends = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Side:
    """One of the two models: a quantised one, or one with values of this dtype."""

    dtype: str
    blur: float
    is_quantised: bool
    is_nearest: bool

    @classmethod
    def of(cls, info: TensorInfo) -> _Side:
        schemes = schemes_of(info)
        return cls(
            info.dtype, max((scheme.blur for scheme in schemes), default=0.0), bool(schemes),
            all(scheme.is_nearest for scheme in schemes),
        )  # fmt: skip

    def cells(self, values: torch.Tensor, ends: Ends | None) -> _Cells:
        if ends is None:
            width = unit(values, FLOAT_FORMATS[self.dtype])
            return _Cells(values - width / 2, values + width / 2, values, width, values != 0)
        low, high = ends
        low.nan_to_num_(-math.inf, math.inf, -math.inf)
        high.nan_to_num_(math.inf, math.inf, -math.inf)
        closed = low.isfinite() & high.isfinite()
        below, above = values - low, high - values
        # Of what has no end on one side the other half counts twice.
        width = torch.where(closed, below + above, 2 * torch.minimum(below, above))
        width = width.nan_to_num_(0.0, 0.0, 0.0)
        middle = torch.where(closed, (low + high) / 2, values)
        blur = self.blur * width
        low = low - blur - _BLUR * low.abs().nan_to_num_(posinf=0.0)
        high = high + blur + _BLUR * high.abs().nan_to_num_(posinf=0.0)
        return _Cells(low, high, middle, width, closed & (width > 0))


@dataclass
class _Cells:
    """What the values of a block stand for: ends, with what these may be off, the middle, and what
    is between them. `known` marks those that have two ends."""

    low: torch.Tensor
    high: torch.Tensor
    middle: torch.Tensor
    width: torch.Tensor
    known: torch.Tensor


class QuantisingTest:
    """Takes one block of both sides after the other.

    It has passed while all tuned values are the base's, quantised. Or both may be of the same
    numbers: what they stand for overlaps everywhere, and differences are spread as rounding spreads
    them, or both have the same codes, under scales that differ a little.
    """

    def __init__(self, base: TensorInfo, tuned: TensorInfo) -> None:
        self._sides = _Side.of(base), _Side.of(tuned)
        self._both = all(side.is_quantised for side in self._sides)
        nearest = all(side.is_nearest for side in self._sides)
        self._rounded = nearest and self._sides[1].is_quantised
        self._overlap = nearest
        self._alike = nearest and self._both
        self._count = 0
        self._shares = 0.0
        self._differing = 0.0
        self._within_rows = [0.0, 0.0]
        self._of_base = 0.0
        self._squares = 0.0
        self._values = 0

    def take(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        ends: tuple[Ends | None, Ends | None],
    ) -> None:
        """Rows of the base and of the tuned model, and of what they stand for."""
        cells = [
            side.cells(values, own)
            for side, values, own in zip(self._sides, (before, after), ends, strict=True)
        ]
        if self._rounded or self._overlap:
            self._compare(before, after, *cells)
        self._estimate(after - before, [cell.width.square_().div_(12) for cell in cells])

    def _compare(
        self, before: torch.Tensor, after: torch.Tensor, base: _Cells, tuned: _Cells
    ) -> None:
        if self._rounded:
            self._rounded = bool(((tuned.low <= before) & (before <= tuned.high)).all())
        overlap = torch.maximum(base.low, tuned.low) <= torch.minimum(base.high, tuned.high)
        self._overlap = self._overlap and bool(overlap.all())
        wide = torch.maximum(base.width, tuned.width)
        narrow = torch.minimum(base.width, tuned.width)
        if self._alike:
            self._alike = bool(((after - before).abs() <= narrow / 2).all())
        chosen = base.known & tuned.known
        if not self._both:
            chosen &= wide >= _FINER * narrow
        expected = (base.width.square() + tuned.width.square())[chosen] / 12
        squares = (tuned.middle - base.middle)[chosen].square()
        self._count += squares.numel()
        self._shares += float((squares / expected).sum(dtype=torch.float64))

    def _estimate(self, difference: torch.Tensor, expected: list[torch.Tensor]) -> None:
        """Add up what quantising rounds off on average: of the base, and of what differs."""
        squares = difference.square()
        base = expected[0] if self._sides[0].is_quantised else torch.zeros_like(squares)
        tuned = expected[1] if self._sides[1].is_quantised else torch.zeros_like(squares)
        differing = (difference != 0).to(squares.dtype)
        self._differing += _sum((base + tuned).mul_(differing) if self._both else tuned * differing)
        if self._both:
            return
        self._values += squares.numel()
        self._of_base += _sum(base)
        self._squares += _sum(squares)
        # Rows may differ in the size of weights and of changes alike, so each is its own measure.
        centred = base - base.mean(1, keepdim=True)
        self._within_rows[0] += _sum(centred * squares)
        self._within_rows[1] += _sum(centred.square_())

    @property
    def passed(self) -> bool:
        if self._rounded or (self._overlap and self._alike):
            return True
        if not self._overlap or not self._count:
            return False
        share = self._shares / self._count
        if self._both:
            return abs(share - 1) <= enough_spread(self._count, _SPREAD_OF_BOTH)
        low, high = _SPREAD_OF_ONE
        return (
            1 - enough_spread(self._count, 1 - low)
            <= share
            <= 1 + enough_spread(self._count, high - 1)
        )

    @property
    def noise(self) -> float:
        """‖·‖² of what quantising rounded off in the difference, estimated.

        What the tuned side rounded off is in it. What the base's did is not where the tuned model
        was made from the quantised base: then differences are no larger where its values are
        further apart.
        """
        return self._differing + (self._of_base if self._was_before else 0.0)

    @property
    def _was_before(self) -> bool:
        """Whether the tuned model was made from what the base was before it was quantised."""
        if self._squares < self._of_base / 2:
            return False
        covariance, variance = self._within_rows
        mean = self._of_base / max(1, self._values)
        if variance < _LEAST_VARIATION * mean**2 * self._values:
            return True
        return covariance > variance / 2


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
