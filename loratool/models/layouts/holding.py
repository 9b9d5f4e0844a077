"""Which tensors of a model hold which parameters, and where a change of one goes in the files.

Files, transformers 4 and transformers 5 name and cut weights differently. `table` says what every
tensor is in memory; here a delta and the tensors that hold its parameter are brought together: an
expert of a stack, gate and up of one matrix, q, k and v of another. All of it is arithmetic on rows
of matrices `[rows, columns]` as they are in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loratool.models.layouts.overlap import Target, across, overlap
from loratool.models.layouts.parameter import (
    Holder,
    MemoryParameter,
    MisfitError,
    Rows,
    complete,
    matrix_of,
)
from loratool.models.layouts.shares import Share
from loratool.models.layouts.table import Names, Segment, rope_order
from loratool.storage.tensors import TensorInfo


class Holdings:
    """The parameters of one model, by their names in memory."""

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.names = Names(config, tensors)
        self._config = config
        self._tensors = tensors
        self._parts: dict[str, list[tuple[TensorInfo, Segment]]] = defaultdict(list)
        #: Whether a tensor holds parameters of unequal sizes.
        self.has_blocks = False
        for name, info in tensors.items():
            for segment in self.names.segments(name):
                self._parts[segment.memory].append((info, segment))
                if segment.into is not None and segment.into.count:
                    self.has_blocks = True
        self._parameters: dict[tuple[str, bool], MemoryParameter] = {}
        #: Rows of parameters as adapters have them: where a tensor holds several, of unequal sizes,
        #: nothing else tells how many are whose.
        self.known_rows: dict[str, int] = {}
        #: Rows of parts with the same share and size: there are thousands of each.
        self._spans: dict[tuple[int, int, int], tuple[range, int, range]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, memory: object) -> bool:
        return memory in self._parts

    def tensor(self, name: str) -> TensorInfo:
        """A tensor by its name in the files."""
        return self._tensors[name]

    def same(self, name: str) -> TensorInfo | None:
        """The tensor that is the parameter called `name`, all of it and nothing else."""
        segments = self.names.segments(name)
        found = self._parts.get(segments[0].memory, []) if len(segments) == 1 else []
        alike = len(found) == 1 and found[0][1] == segments[0] and segments[0].expert is None
        return found[0][0] if alike else None

    def parameter(self, memory: str, stacked: bool) -> MemoryParameter:
        """A parameter, which is a stack of matrices or one, by its name in memory.

        Raises MisfitError where the model lacks it, an expert or a part of it.
        """
        key = memory, stacked
        if key not in self._parameters:
            if memory not in self._parts:
                raise MisfitError(f"the base has no {memory}")
            found = complete(memory, list(self._resolved(memory, stacked)))
            self._parameters[key] = found
        return self._parameters[key]

    def targets(
        self,
        name: str,
        shape: tuple[int, int],
        experts: int | None = None,
        stored_in: Holdings | None = None,
    ) -> list[Target]:
        """Where all rows of a delta `(out, in)` for the weight `name` go.

        With `experts` there is such a delta for each matrix of the parameter. With `stored_in` it
        is no delta, but a tensor of another model, which may lie as that model has it. Raises
        MisfitError where rows have no place.
        """
        out, columns = shape
        segments = self._numbered(self.names.segments(name))
        found: list[Target] = []
        for segment in segments:
            stacked = experts is not None or segment.expert is not None
            parameter = self.parameter(segment.memory, stacked)
            if experts not in (None, parameter.experts):
                raise MisfitError(
                    f"it has {experts} experts, {segment.memory} has {parameter.experts}"
                )
            if segment.columns is not None:
                columns_in = _rows(segment.columns, parameter.columns)
                if (len(columns_in), parameter.rows) != shape:
                    raise MisfitError(_shapes(segment, shape, parameter))
                for held in parameter.of_expert(segment.expert):
                    if held.own != held.memory or len(held.own) != held.size:
                        raise MisfitError(f"{held.info.name} holds a part of {segment.memory}")
                    found.append(across(held, segment.expert, columns_in))
                continue
            flipped = segment.transposed
            if stored_in is not None and segment.maybe_transposed:
                flipped = shape != (parameter.rows, parameter.columns)
            height = columns if flipped else out
            if segment.into is not None and segment.into.count:
                own = self._block(name, segment, height)
            else:
                own = _rows(segment.into, height)
            size = parameter.rows if segment.rows is not None else len(own)
            if stored_in is not None and segment.rows is not None and segment.rows.count:
                memory = stored_in.rows_of(name, segment.memory, stacked)
            else:
                memory = self._ordered(segment, _rows(segment.rows, size))
            if (len(memory), size) != (len(own), parameter.rows) or (
                parameter.columns != (out if flipped else columns)
            ):
                raise MisfitError(_shapes(segment, shape, parameter))
            for held in parameter.of_expert(segment.expert):
                if flipped and (memory != held.memory or len(own) != size):
                    raise MisfitError(f"{held.info.name} is stored otherwise, and in parts")
                found += overlap(
                    held, segment.expert, experts, memory, own, None if flipped else out
                )
        covered = sum(out if t.rows is None else len(t.rows) for t in found)
        if covered != out * (experts or 1):
            raise MisfitError(
                f"{covered:,} of its {out * (experts or 1):,} rows have a place in the base"
            )
        return found

    def rows_of(self, name: str, memory: str, stacked: bool) -> Rows:
        """The rows of a parameter that a tensor holds."""
        for held in self.parameter(memory, stacked).held:
            if held.info.name == name:
                return held.memory
        raise MisfitError(f"{name} is no part of {memory}")

    def _block(self, name: str, segment: Segment, height: int) -> range:
        """The rows of a tensor that hold one of several parameters of unequal sizes."""
        assert segment.into is not None
        sizes: dict[int, int | None] = {
            s.into.index: self._rows_in_memory(s.memory)
            for s in self.names.segments(name)
            if s.into is not None and s.into.index is not None
        }
        unknown = [i for i, rows in sizes.items() if rows is None]
        if len(unknown) == 1 and len(sizes) == segment.into.count:
            sizes[unknown[0]] = height - sum(rows or 0 for rows in sizes.values())
        ordered = [sizes.get(i) or 0 for i in range(segment.into.count)]
        if min(ordered) < 1 or sum(ordered) != height:
            raise MisfitError(
                f"{name} holds it beside others, and nothing tells which rows are whose"
            )
        index = segment.into.index or 0
        start = sum(ordered[:index])
        return range(start, start + ordered[index])

    def _rows_in_memory(self, memory: str) -> int | None:
        """How many rows a parameter has, if it has a tensor of its own, or an adapter tells."""
        alone = [info for info, s in self._parts.get(memory, ()) if s.into is None]
        if not alone:
            return self.known_rows.get(memory)
        return alone[0].shape[0] if alone[0].shape else 1

    def _numbered(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Segments whose experts have the numbers of their own stack, where files number the
        experts of several stacks on; the stacks here tell how many there are."""
        if all(segment.experts is None for segment in segments):
            return segments
        found = []
        for segment in segments:
            if segment.experts is None or segment.expert is None:
                found.append(segment)
                continue
            start, stop = segment.experts
            count = self.parameter(segment.memory, True).experts
            number = segment.expert - int(start * count / (stop - start))
            if 0 <= number < count:
                found.append(replace(segment, expert=number, experts=None))
        return found

    def _resolved(self, memory: str, stacked: bool) -> Iterator[Holder]:
        parts = [(info, s, self._is_flipped(info, s)) for info, s in self._parts[memory]]
        blocks: dict[int | None, dict[int, int]] = defaultdict(dict)
        for info, segment, flipped in parts:
            if segment.rows is not None and segment.rows.index is not None:
                rows, _ = matrix_of(info, flipped, stacked and segment.expert is None)
                blocks[segment.expert][segment.rows.index] = rows
        for info, segment, flipped in parts:
            if segment.columns is not None:
                raise MisfitError(f"{info.name} holds columns of {memory}, which is not known")
            expert, share = segment.expert, segment.rows
            rows, columns = matrix_of(info, flipped, stacked and expert is None)
            if segment.into is not None and segment.into.count:
                own = self._block(info.name, segment, rows)
                size, there = len(own), range(len(own))
            elif share is not None and share.index is not None:
                # Blocks of unequal sizes follow one another.
                sizes = blocks[expert]
                own, size = range(rows), sum(sizes.values())
                start = sum(sizes.get(i, 0) for i in range(share.index))
                there = range(start, start + rows)
            else:
                key = id(share), id(segment.into), rows
                if key not in self._spans:
                    own = _rows(segment.into, rows)
                    size = _whole(share, len(own))
                    self._spans[key] = own, size, _rows(share, size)
                own, size, there = self._spans[key]
            placed = self._ordered(segment, there)
            yield Holder(info, expert, stacked, flipped, columns, size, placed, own)

    def _ordered(self, segment: Segment, memory: range) -> Rows:
        """Rows of a parameter in the order in which the file has them."""
        if not segment.order:
            return memory
        heads: Any = 1
        if segment.order != "interleaved":
            heads = self._config
            for field in segment.order.removeprefix("rope:").split("."):
                heads = heads.get(field) if isinstance(heads, Mapping) else None
        if type(heads) is not int or heads < 1 or len(memory) % (2 * heads):
            raise MisfitError(
                f"rows of {segment.memory} are in another order in the file, which depends on "
                f"{segment.order.removeprefix('rope:')} of config.json"
            )
        order = np.argsort(rope_order(len(memory), heads))
        return tuple(memory[i] for i in order)

    def _is_flipped(self, info: TensorInfo, segment: Segment) -> bool:
        """Whether a tensor lies transposed; where files have it both ways, by the hidden size."""
        if not segment.maybe_transposed:
            return segment.transposed
        text = self._config.get("text_config") or self._config
        hidden = text.get("hidden_size")
        inwards = segment.memory.rpartition(".")[2].startswith("down")
        rows, columns = info.shape[-2:]
        if rows == columns or hidden not in (rows, columns):
            raise MisfitError(
                f"files have {info.name} both ways round, and hidden_size of config.json does not "
                f"tell which it is here, {[rows, columns]}"
            )
        return bool(hidden == (columns if inwards else rows))


def _rows(share: Share | None, size: int) -> range:
    """The rows that are this share of `size` rows."""
    rows = range(size) if share is None else share.of(size)
    if rows is None:
        raise MisfitError(f"{size} rows cannot be divided as they should")
    return rows


def _whole(share: Share | None, part: int) -> int:
    """The number of rows of which `part` are this share."""
    return part if share is None else round(part * share.step / (share.stop - share.start))


def _shapes(segment: Segment, delta: tuple[int, int], parameter: MemoryParameter) -> str:
    return (
        f"its shapes do not fit: B·A is {list(delta)} there, {segment.memory} is "
        f"{[parameter.rows, parameter.columns]}"
    )
