"""Where each element of a tensor came from: every element of a model has a number of its own."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loratool.models.layouts.table import rope_order

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows `range(start, stop, step)` of so many."""

    start: int
    stop: int
    step: int
    of: int

    @property
    def is_all(self) -> bool:
        return (self.start, self.stop, self.step) == (0, self.of, 1)


@dataclass(frozen=True)
class Piece:
    """What a tensor, or some of its rows, was before the conversion; see table.Segment."""

    memory: str
    expert: int | None = None
    rows: Rows | None = None
    into: Rows | None = None
    stacked: bool = False
    transposed: bool = False
    #: The order of rows, and the number of heads it takes.
    order: str = ""
    heads: int = 0


def number(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """A state with these shapes, in which no two elements are equal."""
    state, start = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        state[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(tuple(shape))
        start += count
    return state


class Origins:
    """The parameters of a numbered state, by the numbers of their elements."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._names = [name for name, shape in shapes.items() if math.prod(shape)]
        self._shapes = [tuple(shapes[name]) for name in self._names]
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        self._starts = [0, *(int(end) for end in ends[:-1])]

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        """What the tensor is made of; ValueError if it is no row-wise rearrangement."""
        values: Numbers = np.atleast_1d(tensor.numpy()).astype(np.int64)
        first = bisect_right(self._starts, int(values.flat[0])) - 1
        if values.max() < self._end(first) and values.min() >= self._starts[first]:
            return [self._piece(values, first)]
        for axis in range(min(2, values.ndim)):
            found = self._split(values, axis)
            if found is not None:
                return found
        raise ValueError("elements of several parameters in one row")

    def _end(self, owner: int) -> int:
        return self._starts[owner] + math.prod(self._shapes[owner])

    def _split(self, values: Numbers, axis: int) -> list[Piece] | None:
        """The pieces of a tensor whose rows are of several parameters."""
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        owners = np.searchsorted(np.array(self._starts), rows, side="right") - 1
        if not (owners == owners[:, :1]).all():
            return None
        found = []
        for owner in dict.fromkeys(owners[:, 0].tolist()):
            own = np.flatnonzero(owners[:, 0] == owner)
            into = _rows(own, values.shape[axis])
            if into is None:
                return None
            piece = self._piece(np.take(values, own, axis), owner)
            found.append(replace(piece, into=into, stacked=piece.stacked or axis == 1))
        return found

    def _piece(self, values: Numbers, owner: int) -> Piece:
        return Piece(
            self._names[owner], **_described(values - self._starts[owner], self._shapes[owner])
        )


def _described(values: Numbers, shape: tuple[int, ...]) -> dict[str, Any]:
    """How `values` are taken from a parameter of this shape, numbered from 0."""
    whole: Numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape or (1,))
    if values.size == whole.size and (values.ravel() == whole.ravel()).all():
        return {}
    if values.ndim == whole.ndim - 1 > 0:
        expert = int(values.flat[0]) // math.prod(shape[1:])
        found = _as_matrix(values, whole[expert])
        if found is not None:
            return {"expert": expert, **found}
    found = _as_matrix(values, whole)
    if found is None and values.ndim == whole.ndim == 3 and len(values) == len(whole):
        found = _as_matrix(values[0], whole[0])
        if found is not None:
            for at, matrix in enumerate(whole):
                if _as_matrix(values[at], matrix) != found:
                    raise ValueError("experts differ")
            found = {"stacked": True, **found}
    if found is None:
        raise ValueError(f"no rows of {shape} in order")
    return found


def _as_matrix(values: Numbers, whole: Numbers) -> dict[str, Any] | None:
    """How `values` are rows of `whole`, or of its transpose."""
    for transposed in (False, True):
        kept = values.T if transposed else values
        if kept.shape[1:] != whole.shape[1:] or (transposed and whole.ndim != 2):
            continue
        firsts = whole.reshape(len(whole), -1)[:, 0]
        lookup = {int(first): at for at, first in enumerate(firsts)}
        at = [lookup.get(int(first), -1) for first in kept.reshape(len(kept), -1)[:, 0]]
        if -1 in at or not (whole[at] == kept).all():
            continue
        flag = {"transposed": True} if transposed else {}
        rows = _rows(np.array(at), len(whole))
        if rows is not None:
            return flag if rows.is_all else {"rows": rows, **flag}
        start = min(at)
        for heads in range(1, len(at) // 2 + 1):
            if len(at) % (2 * heads) == 0:
                order = rope_order(len(at), heads)
                if [at[disk] - start for disk in order] == list(range(len(at))):
                    rows = Rows(start, start + len(at), 1, len(whole))
                    order_name = "rope" if heads > 1 else "interleaved"
                    return {
                        **flag, "order": order_name, "heads": heads,
                        **({} if rows.is_all else {"rows": rows}),
                    }  # fmt: skip
    return None


def _rows(at: npt.NDArray[Any], of: int) -> Rows | None:
    step = int(at[1] - at[0]) if len(at) > 1 else 1
    if step not in (1, 2) or (np.diff(at) != step).any():
        return None
    return Rows(int(at[0]), int(at[-1]) + 1, step, of)
