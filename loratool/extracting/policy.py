"""Which rank each module of an adapter gets: by a criterion, or for a file of some size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratool.dtypes import DTYPE_BITS
from loratool.errors import UsageError
from loratool.extracting.counterparts import Counterpart
from loratool.extracting.decomposed import Decomposed, by_unit, joined_stacks
from loratool.linalg.lowrank import Float64
from loratool.linalg.ranks import LARGEST_RANK, Criterion, spread
from loratool.words import format_bytes

#: The lowest rank that is computed for a budget, of which it may take less.
_LEAST = 8


@dataclass(frozen=True)
class Policy:
    """How the ranks are chosen: by `criterion`, or such that the file is no larger than `budget`.

    With `uniform` all modules get the same. No rank is above what the widest matrix has.
    `cost(part)` are the bytes of one rank of a module, and `size(parts, ranks)` those of the file;
    of a stack they are given one matrix, and count all.
    """

    criterion: Criterion
    cost: Callable[[Counterpart], int]
    size: Callable[[Sequence[Counterpart], Sequence[int]], int]
    budget: int | None = None
    uniform: bool = False

    def first(self, parts: Sequence[Counterpart]) -> Criterion:
        """What is computed of each of all these `parts` before anything is known of the others."""
        if self.budget is None:
            return self.criterion
        guess = self.budget // max(1, sum(self.cost(part) for part in by_unit(parts)))
        guess = max(guess if self.uniform else 2 * guess, _LEAST)
        return Criterion(rank=min(guess, self.criterion.max_rank or LARGEST_RANK))

    def ranks(self, found: Sequence[Decomposed]) -> dict[str, int]:
        """The rank of each module, by unit; it may be higher than what was computed of it.

        All matrices of a stack have one: the highest that one of them needs. Where it depends on
        errors, a rank of a stack counts as one of a module, of all its matrices together.
        """
        units = [one.part.unit for one in found]
        if self.criterion.rank is not None:
            widest = widest_of([f.part for f in found])
            return dict.fromkeys(units, min(self.criterion.rank, widest))
        stacks = joined_stacks(found)
        parts = [f.part for f in stacks]
        if self.budget is not None and self.uniform:
            ranks = [self.even(parts)] * len(parts)
        elif self.budget is not None:
            ranks = self._spread(parts, [f.values for f in stacks], self.budget)
        elif self.uniform and found:
            ranks = [max(len(f.values) for f in found)] * len(parts)
        else:
            ranks = [len(f.values) for f in stacks]
        return dict(zip([part.unit for part in parts], ranks, strict=True))

    def even(self, found: Sequence[Counterpart]) -> int:
        """The one rank for which the budget is enough, up to the largest that a module can have.

        Raises UsageError if it is not enough for one.
        """
        parts = by_unit(found)
        budget, costs = self.budget or 0, sum(self.cost(part) for part in parts)
        if self.size(parts, [1] * len(parts)) > budget:
            raise _too_small(budget, costs, "all modules")
        largest = widest_of(parts)
        rank = min(budget // costs, self.criterion.max_rank or largest, largest)
        while self.size(parts, [rank] * len(parts)) > budget:
            rank -= 1
        return rank

    def _spread(
        self, parts: Sequence[Counterpart], values: Sequence[Float64], budget: int
    ) -> list[int]:
        costs = [self.cost(part) for part in parts]
        rest = budget - (self.size(parts, [1] * len(parts)) - sum(costs))
        while True:
            ranks = spread(values, costs, rest)
            if not any(ranks):
                raise _too_small(budget, min(costs), "the smallest module")
            alive = [(part, rank) for part, rank in zip(parts, ranks, strict=True) if rank]
            over = self.size([p for p, _ in alive], [r for _, r in alive]) - budget
            if over <= 0:
                return ranks
            rest -= over  # larger ranks have more digits in the header


def _too_small(budget: int, least: int, what: str) -> UsageError:
    return UsageError(
        f"--budget {format_bytes(budget)} is too small: one rank of {what} takes "
        f"{format_bytes(least)}, beside the header and what is saved whole.",
        "Give more, or leave parts out with --exclude or --skip.",
    )


def widest_of(parts: Sequence[Counterpart]) -> int:
    """The largest rank that one of these modules can have."""
    return max(min(part.outline.shape) for part in parts)


def cost(part: Counterpart, dtype: str) -> int:
    """Bytes of one rank of a module, or of the stack that it is of."""
    elements = sum(outline.experts * sum(outline.shape) for outline in part.filed())
    return elements * DTYPE_BITS[dtype] // 8
