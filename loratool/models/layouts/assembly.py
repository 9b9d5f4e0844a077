"""Tensors of one layout put together from the files of another one, without a copy.

Two models of one architecture may be cut differently: experts one by one or as a stack, q, k and v
apart or together. To compare them, a tensor of the one is made of views of the other's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.overlap import Target
from loratool.models.layouts.parameter import MisfitError, Rows
from loratool.models.layouts.place import Place
from loratool.storage.composed import alternating, joined, view
from loratool.storage.tensors import TensorInfo


def assembled(
    holdings: Holdings, name: str, shape: Sequence[int], other: Holdings
) -> tuple[TensorInfo, set[str]]:
    """The tensor that is called `name` and has this shape in another model, put together from the
    tensors of this one; and the names of these.

    Raises MisfitError where something of it is not there, or parts have different dtypes.
    """
    if len(shape) == 3:
        try:
            return _assembled(holdings, name, shape, True, other)
        except MisfitError:
            if not name.endswith(".weight"):  # which a convolution has
                raise
    return _assembled(holdings, name, shape, False, other)


def _assembled(
    holdings: Holdings, name: str, shape: Sequence[int], stack: bool, other: Holdings
) -> tuple[TensorInfo, set[str]]:
    axes = shape[1:] if stack else shape
    out, columns = axes[0] if axes else 1, math.prod(axes[1:])
    targets = holdings.targets(name, (out, columns), shape[0] if stack else None, other)
    members: dict[int, list[Target]] = defaultdict(list)
    for target in targets:
        members[target.member or 0].append(target)
    parts = [part for n in sorted(members) for part in _rows_of(holdings, members[n])]
    names = {target.place.tensor for target in targets}
    if len({part.dtype for part in parts}) > 1:
        raise MisfitError(f"its parts have different dtypes, see {min(names)}")
    if len(parts) == 1:
        found = replace(parts[0], name=name, shape=tuple(shape))
        return replace(found, strides=_kept(parts[0], shape)), names
    return joined(name, shape, parts), names


def rest_of(holdings: Holdings, name: str, without: Collection[str]) -> dict[str, TensorInfo]:
    """The parts of a tensor that hold other parameters than these, by their names in memory.

    Raises MisfitError where one of them is not all there, or not in its order.
    """
    rest = {}
    for segment in holdings.names.segments(name):
        if segment.memory not in without:
            for held in holdings.parameter(segment.memory, segment.expert is not None).held:
                if held.info.name != name:
                    continue
                if held.memory != range(held.size):
                    raise MisfitError(f"{name} holds a part of {segment.memory}, or reordered")
                place = Place(name, rows=held.own, transposed=held.transposed)
                rest[segment.memory] = next(view_of(held.info, place))
    return rest


def view_of(info: TensorInfo, place: Place) -> Iterator[TensorInfo]:
    """The rows of a tensor that a place speaks of, `[rows, columns]`, as views of it."""
    strides = info.strides or _row_major(info.shape)
    offset = 0
    shape = info.shape
    if place.expert is not None:
        offset, shape, strides = place.expert * strides[0], shape[1:], strides[1:]
    if place.transposed:
        shape, strides = shape[::-1], strides[::-1]
    runs: list[Rows] = [range(shape[0])] if place.rows is None else _runs(place.rows)
    for rows in runs:
        step = rows.step if isinstance(rows, range) else 1
        own = (len(rows), *shape[1:])
        kept = _unless_dense(own, (strides[0] * step, *strides[1:]))
        yield view(info, own, offset + rows[0] * strides[0], kept)


def _rows_of(holdings: Holdings, targets: Sequence[Target]) -> Iterator[TensorInfo]:
    """Views of the rows of one matrix, in their order, from the places that they come from."""
    ordered = sorted(targets, key=lambda target: target.rows[0] if target.rows else 0)
    turns = [t.rows.step if isinstance(t.rows, range) and len(t.rows) > 1 else 1 for t in ordered]
    views = [list(_views(holdings, target.place)) for target in ordered]
    if turns == [len(ordered)] * len(ordered) and all(len(own) == 1 for own in views):
        yield _in_turns([own[0] for own in views])
        return
    if any(turn > 1 for turn in turns) or any(isinstance(t.rows, tuple) for t in ordered):
        raise MisfitError(f"the rows of {ordered[0].place.tensor} are in another order")
    for own in views:
        yield from own


def _views(holdings: Holdings, place: Place) -> Iterator[TensorInfo]:
    """Views of a place's rows; one, where two halves of them take turns."""
    rows = place.rows
    info = holdings.tensor(place.tensor)
    if isinstance(rows, tuple) and len(rows) % 2 == 0:
        halves = [_runs(rows[turn::2]) for turn in (0, 1)]
        if all(len(half) == 1 for half in halves):
            parts = [next(view_of(info, replace(place, rows=half[0]))) for half in halves]
            yield _in_turns(parts)
            return
    yield from view_of(info, place)


def _in_turns(parts: Sequence[TensorInfo]) -> TensorInfo:
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    return alternating(parts[0].name, (rows, *parts[0].shape[1:]), parts)


def _runs(rows: Rows) -> list[Rows]:
    """Rows as ranges, one after the other, each with the longest step that goes on."""
    if isinstance(rows, range):
        return [rows]
    runs: list[Rows] = []
    first = 0
    while first < len(rows):
        last = first + 1
        step = rows[last] - rows[first] if last < len(rows) else 1
        while last < len(rows) and step > 0 and rows[last] - rows[last - 1] == step:
            last += 1
        step = step if last - first > 1 else 1
        runs.append(range(rows[first], rows[last - 1] + 1, step))
        first = last
    return runs


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _unless_dense(shape: Sequence[int], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    dense = all(n == 1 or s == d for n, s, d in zip(shape, strides, _row_major(shape), strict=True))
    return None if dense else strides


def _kept(part: TensorInfo, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a part that becomes a tensor of this shape."""
    if part.strides is None or part.shape == tuple(shape):
        return part.strides
    if part.shape == tuple(shape)[-len(part.shape) :]:
        return (0,) * (len(shape) - len(part.shape)) + part.strides
    raise MisfitError(f"{part.name} lies otherwise in its file")
