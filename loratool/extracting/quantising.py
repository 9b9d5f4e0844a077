"""Do two tensors differ by no more than what quantising rounds off; how much of it is that?

A quantised value stands for all numbers between two ends (`models.quantised.ends`). A fine-tune of
the 16-bit original differs from a quantised base everywhere by what quantising rounded off, also
where nothing was trained: by 9 % of the weights' norm in 4 bits. As with dtypes (`rounding`), what
is left out is proved, value by value; a trained change that is smaller is not taken for noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loratool.dtypes import FLOAT_FORMATS
from loratool.extracting.rounding import enough_spread
from loratool.models.quantised.ends import schemes_of
from loratool.storage.tensors import TensorInfo

#: How far off ends may be, as a share of themselves: half a unit of bfloat16, which models are
#: stored in, and which libraries divide in before they round.
_BLUR = 2.0**-8

#: How far the mean square of errors may be from that of rounding, where one side is quantised. What
#: was made from the quantised values themselves is far below.
_SPREAD_OF_ONE = 0.4
#: The same where both are: half of it is less if one was made from the other's values.
_SPREAD_OF_BOTH = 0.15

#: Where one side tells numbers so much more finely, what it rounds off itself is of no account.
_FINER = 4

#: How much the width of what values stand for has to vary within rows to explain anything.
_LEAST_VARIATION = 0.05

#: Values that are looked at together, and those of a block that sums are made of.
_SAMPLE = 1 << 16

#: Lower and upper ends of what values stand for.
Ends = tuple[torch.Tensor, torch.Tensor]
#: Reads those of some rows of a block: of the base and of the tuned model, None for a plain one.
ReadEnds = Callable[[int, int], tuple[Ends | None, Ends | None]]


@dataclass(frozen=True)
class _Cells:
    """What some values stand for: the two ends, and the width of what is between them."""

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    width: torch.Tensor
    #: How far off the ends may be.
    slack: torch.Tensor

    def may_be(self, number: torch.Tensor) -> bool:
        """Whether these numbers became the values."""
        return _none_beyond(torch.maximum(self.low - number, number - self.high), self.slack)

    def may_be_of(self, other: _Cells) -> bool:
        """Whether the values of both sides may be of the same numbers."""
        apart = torch.maximum(self.low - other.high, other.low - self.high)
        return _none_beyond(apart, self.slack + other.slack)


class _Side:
    """One of the two models."""

    def __init__(self, info: TensorInfo) -> None:
        schemes = schemes_of(info)
        self.is_quantised = bool(schemes)
        self.is_nearest = all(scheme.is_nearest for scheme in schemes)
        self._blur = max((scheme.blur for scheme in schemes), default=0.0)
        self._unit = 2 * FLOAT_FORMATS[info.dtype].rounding

    def cells(self, value: torch.Tensor, ends: Ends | None) -> _Cells:
        size = value.abs()
        if ends is None:
            width = size * self._unit
            return _Cells(value, value, value, width, width / 2)
        low, high = ends
        width = high - low
        # Of what has one end only, the other half is as wide; of nothing at all, nothing is known.
        half = torch.minimum(value - low, high - value)
        width = width.where(width.isfinite(), 2 * half).nan_to_num_(0.0, 0.0, 0.0)
        return _Cells(value, low, high, width, size.mul_(_BLUR).add_(width, alpha=self._blur))


class QuantisingTest:
    """Takes one block of both sides after the other.

    It has passed while all tuned values are the base's, quantised. Or both may be of the same
    numbers: what they stand for overlaps everywhere, and differences are spread as rounding spreads
    them, or both have the same codes, under scales that differ a little.
    """

    def __init__(self, base: TensorInfo, tuned: TensorInfo) -> None:
        self._sides = _Side(base), _Side(tuned)
        self._both = all(side.is_quantised for side in self._sides)
        nearest = all(side.is_nearest for side in self._sides)
        self._rounded = nearest and self._sides[1].is_quantised
        self._overlap = nearest
        self._alike = nearest and self._both
        self._spread = _Mean()
        self._sums = _Sums()

    def take(
        self, before: torch.Tensor, after: torch.Tensor, ends: ReadEnds, explained: bool
    ) -> None:
        """Rows of the base and of the tuned model, widened to one dtype. They are `explained` where
        the tuned values are the base's, rounded to their dtype, which all stand for."""
        rows = max(1, _SAMPLE // before.shape[1])
        for low in range(0, len(before), rows):
            if low and (explained or not (self._rounded or self._overlap)):
                return
            high = min(low + rows, len(before))
            base, tuned = (
                side.cells(values[low:high], own)
                for side, values, own in zip(
                    self._sides, (before, after), ends(low, high), strict=True
                )
            )
            self._prove(base, tuned)
            if low == 0:
                self._measure(base, tuned, len(before) / high)

    def _prove(self, base: _Cells, tuned: _Cells) -> None:
        self._rounded = self._rounded and tuned.may_be(base.value)
        self._overlap = self._overlap and base.may_be_of(tuned)
        if self._alike:
            narrow = torch.minimum(base.width, tuned.width)
            self._alike = _none_beyond((tuned.value - base.value).abs_(), narrow / 2)

    def _measure(self, base: _Cells, tuned: _Cells, weight: float) -> None:
        """How differences are spread, and what of them is rounding on average, in rows that stand
        for `weight` times as many."""
        expected = base.width.square() + tuned.width.square()
        if self._overlap:
            chosen = expected > 0
            for cells in (base, tuned):
                chosen &= cells.low.isfinite() & cells.high.isfinite()
            if not self._both:
                wide = torch.maximum(base.width, tuned.width)
                chosen &= wide >= _FINER * torch.minimum(base.width, tuned.width)
                # What was zero stays so, and is no sample of what is rounded.
                chosen &= (base.value != 0) | (tuned.value != 0)
            apart = (tuned.low + tuned.high) / 2 - (base.low + base.high) / 2
            self._spread.add((12 * apart.square() / expected)[chosen])
        squares = (tuned.value - base.value).square_()
        of_base, of_tuned = (
            cells.width.square() / 12 if side.is_quantised else torch.zeros_like(squares)
            for side, cells in zip(self._sides, (base, tuned), strict=True)
        )
        differing = (squares > 0).to(squares.dtype)
        self._sums.add(weight, squares, of_base, of_tuned, differing)

    @property
    def passed(self) -> bool:
        if self._rounded or (self._overlap and self._alike):
            return True
        usual = _SPREAD_OF_BOTH if self._both else _SPREAD_OF_ONE
        return self._overlap and self._spread.is_near_one(usual)

    @property
    def noise(self) -> float:
        """‖·‖² of what quantising rounded off in the difference, estimated.

        What the tuned side rounded off is in it. What the base's did is not where the tuned model
        was made from the quantised base: then differences are no larger where its values are
        further apart.
        """
        sums = self._sums
        if self._both:
            return sums.of_both_where_differing
        return sums.of_tuned_where_differing + (sums.of_base if sums.explained_by_base else 0.0)


class _Mean:
    """The mean of numbers that come in turns."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0

    def add(self, numbers: torch.Tensor) -> None:
        self._count += numbers.numel()
        self._sum += _sum(numbers)

    def is_near_one(self, usual: float) -> bool:
        if not self._count:
            return False
        return abs(self._sum / self._count - 1) <= enough_spread(self._count, usual)


class _Sums:
    """Squared differences, and what is expected of them if they are rounding: sums over all."""

    def __init__(self) -> None:
        self.of_base = 0.0
        self.of_tuned_where_differing = 0.0
        self.of_both_where_differing = 0.0
        self._squares = 0.0
        self._count = 0.0
        self._covariance = 0.0
        self._variance = 0.0
        #: The square of how far off the covariance is by chance.
        self._scatter = 0.0

    def add(
        self,
        weight: float,
        squares: torch.Tensor,
        of_base: torch.Tensor,
        of_tuned: torch.Tensor,
        differing: torch.Tensor,
    ) -> None:
        self._count += weight * squares.numel()
        self._squares += weight * _sum(squares)
        self.of_base += weight * _sum(of_base)
        self.of_tuned_where_differing += weight * _sum(of_tuned * differing)
        self.of_both_where_differing += weight * _sum((of_base + of_tuned) * differing)
        # Large weights may have large changes; so rows are compared with themselves alone.
        centred = of_base - of_base.mean(1, keepdim=True)
        self._variance += weight * _sum(centred.square())
        products = centred.mul_(squares)
        self._covariance += weight * _sum(products)
        self._scatter += weight**2 * _sum(products.square_())

    @property
    def explained_by_base(self) -> bool:
        """Whether what the base rounded off is in the differences."""
        if self._squares < self.of_base / 2 or not self._count:
            return False
        if self._variance < _LEAST_VARIATION * self.of_base**2 / self._count:
            return True  # nothing tells
        return self._covariance + 2 * math.sqrt(self._scatter) > self._variance / 2


def _none_beyond(off: torch.Tensor, slack: torch.Tensor) -> bool:
    """Whether nothing is off by more than its slack. What is no number is off by nothing."""
    return float((off - slack).nan_to_num_(0.0, math.inf, -math.inf).max()) <= 0


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
