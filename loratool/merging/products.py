"""Rows of scale·Δ for the stored rows of a tensor: what every pass over a merge is made of.

A delta `Δ [out, in]` has a place in its tensor (see `models.layouts.place`), and a block is a run
of stored rows. Here alone it is decided which part of Δ a block needs, and where in the block it
goes: for plain matrices, transposed ones, slices of fused ones and experts of a stack alike.

There are two kinds of product. `LoadedDelta` is the merge's: a float32 product, then the scale.
`ExactProduct` is that of the undo file: on a grid on which every sum is exact, so that it comes out
the same on every machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from loratool.linalg.reproducible import bits_of_grid, on_grid
from loratool.merging.match import Delta
from loratool.models.layouts.place import Place
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32
from loratool.streams.scratch import scratch

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """What a block and a delta have in common: rows and columns of the block, and of Δ."""

    rows: slice
    columns: slice
    out: slice
    inner: slice

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The part of a block `[stored rows, columns]` that the delta is added to; a view."""
        return block[self.rows, self.columns]


class Placement:
    """A place in a tensor of a known shape, as runs of stored rows and of rows of Δ.

    Rows of Δ are taken in the order in which they are stored; `order` says which these are, None
    where they lie so already.
    """

    def __init__(self, place: Place, stored: Sequence[int]) -> None:
        self.transposed = place.transposed
        self._height, columns = place.matrix(stored)
        self._offset = (place.expert or 0) * self._height
        rows = place.rows
        if rows is None:
            rows = range(columns if place.transposed else self._height)
        self.order: npt.NDArray[np.intp] | None = None
        if not isinstance(rows, range) or rows.step < 0:
            self.order = np.argsort(rows)
            ascending = [rows[i] for i in self.order]
            step = max(1, ascending[1] - ascending[0]) if len(ascending) > 1 else 1
            rows = range(ascending[0], ascending[-1] + 1, step)
            if ascending != list(rows):
                raise ValueError(f"the rows of {place.tensor} are no permutation of a range")
        self._rows = rows

    @property
    def extent(self) -> tuple[int, int]:
        """The stored rows that it lies in, first and last + 1."""
        if self.transposed:
            return self._offset, self._offset + self._height
        return self._offset + self._rows.start, self._offset + self._rows.stop

    def window(self, first: int, last: int) -> Window | None:
        """What stored rows `[first, last)` need of the delta; None for nothing."""
        if self.transposed:
            low = max(first, self._offset)
            high = min(last, self._offset + self._height)
            across = slice(self._rows.start, self._rows.stop, self._rows.step)
            found = Window(
                slice(low - first, high - first), across,
                slice(None), slice(low - self._offset, high - self._offset),
            )  # fmt: skip
            return found if low < high else None
        begin, step, count = self._offset + self._rows.start, self._rows.step, len(self._rows)
        low, high = (min(count, max(0, -((begin - at) // step))) for at in (first, last))
        at = begin + low * step - first
        found = Window(
            slice(at, at + (high - low) * step, step), slice(None), slice(low, high), slice(None)
        )
        return found if low < high else None


def _order(delta: Delta, placement: Placement) -> npt.NDArray[np.intp] | None:
    """The rows of Δ that go to a place, in the order in which they are stored there; None for all
    of them as they are."""
    if delta.rows is None:
        return placement.order
    rows = np.asarray(delta.rows)
    return rows if placement.order is None else rows[placement.order]


class LoadedDelta:
    """One delta with its factors loaded, in the dtype that a job computes in.

    `b [out, r]` and `a [r, in]` are there if Δ is their product, else None.
    """

    def __init__(
        self, delta: Delta, stored: Sequence[int], files: FilePool, work: torch.dtype
    ) -> None:
        self.placement = Placement(delta.place, stored)
        self.window = self.placement.window
        self.transposed = delta.place.transposed
        self.scale = delta.scale
        self.b: torch.Tensor | None = None
        self.a: torch.Tensor | None = None
        order = self._order = _order(delta, self.placement)
        pair = delta.factors.left_right(files)
        if pair is None:
            self._part = delta.factors.part_of(files)
        else:
            b, a = pair
            self.b = torch.from_numpy(b if order is None else b[order]).to(work)
            self.a = torch.from_numpy(a).to(work)
        if self.b is not None and math.frexp(self.scale)[0] in (0.5, -0.5):
            # A power of two scales exactly, so B can take it, and a pass over the product is saved.
            self.b = self.b * self.scale
            self.scale = 1.0
        self._work = work
        self.magnitude: torch.Tensor | None = None
        #: What DoRA multiplies rows (columns where transposed) with; filled block by block.
        self.gains: torch.Tensor | None = None
        if delta.factors.magnitude is not None:
            values = read_float32(delta.factors.magnitude, files).reshape(-1)
            self.magnitude = torch.from_numpy(values if order is None else values[order]).to(work)
            self.gains = torch.empty_like(self.magnitude)

    def product(self, window: Window) -> torch.Tensor:
        """scale·Δ in this window, as it is stored: first the product, then the scale.

        The result is this thread's scratch.
        """
        if self.b is None or self.a is None:
            return self._oriented(self._dense(window))
        b, a = self.b[window.out], self.a[:, window.inner]
        shape = (len(b), a.shape[1])
        out = scratch.get("product", shape[0] * shape[1], b.dtype).view(shape)
        torch.mm(b, a, out=out)
        if self.scale != 1:
            out *= self.scale
        return self._oriented(out)

    def _dense(self, window: Window) -> torch.Tensor:
        rows = window.out if self._order is None else self._order[window.out]
        return torch.from_numpy(self._part(rows, window.inner)).to(self._work) * self.scale

    def _oriented(self, part: torch.Tensor) -> torch.Tensor:
        return part.T if self.transposed else part

    def add_to(self, block: torch.Tensor, first: int, last: int) -> None:
        """Add scale·Δ to stored rows `[first, last)`, `[last - first, columns]`."""
        window = self.window(first, last)
        if window is not None:
            part = window.of(block)
            part += self.product(window)

    def gain(self, direction: torch.Tensor, window: Window) -> torch.Tensor:
        """DoRA's `m/‖W + Δ‖` for the part `direction = W + Δ` of a block, ready to multiply with.

        The norm runs over the weights of one output: a stored row, or a stored column where the
        matrix is transposed; those columns are known beforehand.
        """
        assert self.magnitude is not None
        assert self.gains is not None
        if self.transposed:
            return self.gains
        norms = torch.linalg.norm(direction, dim=1)
        return torch.div(self.magnitude[window.out], norms, out=self.gains[window.out])[:, None]

    def rounded_product(self, window: Window, half: torch.dtype, scale: float) -> torch.Tensor:
        """Δ in this window from factors rounded to `half`, their product rounded too, then scaled.

        `scale` is the delta's own, which B may hold already.
        """
        assert self.b is not None
        assert self.a is not None
        work = self.b.dtype
        b = (self.b * (self.scale / scale) if scale else self.b).to(half).to(work)
        rows = b[window.out] @ self.a.to(half).to(work)[:, window.inner]
        return self._oriented(rows).to(half).to(work) * scale

    def reach(self, window: Window) -> torch.Tensor:
        """Upper bounds of Σ|scale·b·a| in this window, by ‖b‖·‖a‖, as it is stored."""
        if self.b is None:
            # What its elements are sums of is not known: the largest of a row stands for all of it.
            part = self._dense(window).abs()
            return self._oriented(part.amax(dim=1, keepdim=True).expand_as(part))
        b, a = self._norms
        if self.gains is not None:
            b = b * self.gains.abs().clamp(min=1)
        return self._oriented(torch.outer(b[window.out], a[window.inner]))

    @cached_property
    def _norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """‖scale·b‖ of the rows of B, and ‖a‖ of the columns of A."""
        assert self.b is not None
        assert self.a is not None
        return torch.linalg.norm(self.b, dim=1) * abs(self.scale), torch.linalg.norm(self.a, dim=0)


class ExactProduct:
    """`scale·B·A` of one delta on a grid on which every sum is exact.

    For rank r each factor keeps (53 - log2 r)/2 bits below the largest value of its row of B or
    column of A, 24 at rank 16, as many as float32 has: float64 then holds every product and every
    sum of products, and no order of summation can change a bit but the sign of a zero.
    """

    def __init__(self, delta: Delta, stored: Sequence[int], files: FilePool) -> None:
        self.placement = Placement(delta.place, stored)
        self.window = self.placement.window
        self.transposed = delta.place.transposed
        pair = delta.factors.left_right(files)
        order = self._order = _order(delta, self.placement)
        if pair is None:
            self._part = delta.factors.part_of(files)
            self._scale = delta.scale
            self.b = self.a = None
            return
        b, a = pair[0] if order is None else pair[0][order], pair[1]
        bits = bits_of_grid(a.shape[0])
        self.b = torch.from_numpy(on_grid(b.astype(np.float64) * delta.scale, bits, axis=1))
        self.a = torch.from_numpy(on_grid(a.astype(np.float64), bits, axis=0))

    def product(self, window: Window, work: torch.dtype) -> torch.Tensor:
        """The product in this window as it is stored, rounded once to `work`; scratch."""
        if self.b is None or self.a is None:
            exact = self._elementwise(window)
        else:
            b, a = self.b[window.out], self.a[:, window.inner]
            shape = (len(b), a.shape[1])
            exact = scratch.get("exact", shape[0] * shape[1], torch.float64).view(shape)
            torch.mm(b, a, out=exact)
        exact += 0.0  # the sign of a zero is the only thing that still depends on the BLAS
        if work == torch.float32:
            rounded = scratch.get("product", exact.numel(), work).view(exact.shape)
            exact = rounded.copy_(exact)
        return exact.T if self.transposed else exact

    def _elementwise(self, window: Window) -> torch.Tensor:
        """scale·Δ of factors without B and A, one multiplication per element."""
        rows = window.out if self._order is None else self._order[window.out]
        part = self._part(rows, window.inner).astype(np.float64)
        return torch.from_numpy(part).mul_(self._scale)


class _Placed(Protocol):
    @property
    def placement(self) -> Placement: ...


P = TypeVar("P", bound=_Placed)


class Terms(list[P]):
    """The deltas of one tensor, in their order. A stack has one for each expert, and a block meets
    few of them, which are found without asking all."""

    @cached_property
    def _by_bucket(self) -> tuple[int, dict[int, list[int]]]:
        """Rows of a bucket, and by its number the terms that have rows in it."""
        extents = [term.placement.extent for term in self]
        size = max(1, min((stop - start for start, stop in extents), default=1))
        found: dict[int, list[int]] = defaultdict(list)
        for number, (start, stop) in enumerate(extents):
            for bucket in range(start // size, -(-stop // size)):
                found[bucket].append(number)
        return size, found

    def meeting(self, first: int, last: int) -> Iterator[tuple[int, P, Window]]:
        """The terms that have a part in stored rows `[first, last)`: number, term, and where."""
        if not self:  # every element of a tensor that is only cast would be a bucket of its own
            return
        size, buckets = self._by_bucket
        near = {n for b in range(first // size, -(-last // size)) for n in buckets.get(b, ())}
        for number in sorted(near):
            window = self[number].placement.window(first, last)
            if window is not None:
                yield number, self[number], window
