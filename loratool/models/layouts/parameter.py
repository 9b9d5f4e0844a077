"""A parameter in memory, and the tensors of a model's files that hold it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.storage.tensors import TensorInfo

Rows = range | tuple[int, ...]


class MisfitError(Exception):
    """Why a delta has no place in a model, in words that follow the name of the delta."""


@dataclass(frozen=True)
class Holder:
    """What a tensor holds of a parameter: its rows `own`, which are the rows `memory` of `size`.

    `expert` is the matrix of a stack that it holds; None where it holds all, or there is no stack.
    The tensor is transposed first where it lies so.
    """

    info: TensorInfo
    expert: int | None
    stacked: bool
    transposed: bool
    columns: int
    size: int
    memory: Rows
    own: Rows

    @property
    def experts(self) -> int:
        """How many matrices it holds."""
        return self.info.shape[0] if self.stacked and self.expert is None else 1


@dataclass(frozen=True)
class MemoryParameter:
    """A parameter in memory: so many matrices `[rows, columns]`, and the tensors that hold them."""

    experts: int
    rows: int
    columns: int
    #: In the order of experts and rows; by expert, where each has tensors of its own.
    held: tuple[Holder, ...]
    by_expert: Mapping[int | None, Sequence[Holder]]

    def of_expert(self, expert: int | None) -> Sequence[Holder]:
        """The tensors that hold this matrix; all where it is None, or where one holds all."""
        if expert is None or None in self.by_expert:
            return self.held
        return self.by_expert.get(expert, ())


def matrix_of(info: TensorInfo, flipped: bool, stack: bool) -> tuple[int, int]:
    """Rows and columns of a tensor, or of each matrix in it, in the orientation of memory."""
    axes = info.shape[1:] if stack else info.shape
    rows, columns = axes[0] if axes else 1, math.prod(axes[1:])
    return (columns, rows) if flipped else (rows, columns)


def complete(memory: str, held: list[Holder]) -> MemoryParameter:
    """The parameter of these tensors. Raises MisfitError unless they are all of it, once."""
    size, columns = held[0].size, held[0].columns
    by_expert: dict[int | None, list[Holder]] = defaultdict(list)
    counts: dict[int | None, int] = defaultdict(int)
    for one in held:
        if (one.size, one.columns) != (size, columns):
            raise MisfitError(f"the parts of {memory} in the base have different shapes")
        by_expert[one.expert].append(one)
        counts[one.expert] += len(one.memory)
    experts = held[0].experts
    if held[0].expert is not None:
        experts = 1 + max(number for number in by_expert if number is not None)
        missing = next((i for i in range(experts) if i not in by_expert), None)
        if missing is not None:
            raise MisfitError(f"expert {missing} of {memory} is missing in the base")
    for expert, count in counts.items():
        if count != size:
            first = by_expert[expert][0].info.name
            what = "twice" if count > size else "only in part"
            raise MisfitError(f"the base has {memory} {what}, see {first}")
        by_expert[expert].sort(key=lambda one: one.memory[0])
    held.sort(key=lambda one: (one.expert or 0, one.memory[0]))
    return MemoryParameter(experts, size, columns, tuple(held), by_expert)
