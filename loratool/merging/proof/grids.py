"""On whose grid do values lie? Counted value by value, for weights that were quantised.

What others quantised again has scales of its own, and on their grid the merged weight is rounded to
the nearest. What was merged into the model that the base was quantised from is, without the delta,
nearest to what the base holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loratool.merging.arithmetic import RunningJob
from loratool.merging.proof.checking import Pair
from loratool.merging.rounding import TORCH
from loratool.models.quantised.encoding.snapping import snapping, snaps
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.tensors import FilePool, TensorInfo, block_elements, blocks
from loratool.storage.values import values_of
from loratool.streams.run import Run
from loratool.streams.workers import Workers

#: What rounding to 16 bits on the way may have moved a value by, as a share of it; and, where codes
#: are few and their steps wide, rounding of the scale after they were chosen.
_SLACK, _OF_FEW_BITS = 2.0**-8, 2.0**-6


@dataclass
class Near:
    """Of so many elements, those `outside` are not what the grid has nearest; those `doubled` would
    not be if they were twice as far from it."""

    elements: int = 0
    outside: int = 0
    doubled: int = 0

    def __iadd__(self, other: Near) -> Near:
        self.elements += other.elements
        self.outside += other.outside
        self.doubled += other.doubled
        return self


def on_own_grid(pairs: Sequence[Pair], run: Run) -> dict[str, Near]:
    """Whether merged weights that are quantised are what their own grid has nearest to the expected
    ones, by the jobs' names; nothing of those whose grid is not known."""
    return _counted(pairs, run, _OnOwnGrid)


def on_grid_of_base(pairs: Sequence[Pair], run: Run) -> dict[str, Near]:
    """Whether weights of a quantised base are what its grid has nearest to the merged ones without
    their deltas, in a block of each, by the jobs' names; nothing of those whose grid is not
    known."""
    return _counted(pairs, run, _OnGridOfBase)


def _counted(pairs: Sequence[Pair], run: Run, kind: type[_OnGrid]) -> dict[str, Near]:
    found: dict[str, Near] = {}
    with FilePool() as files, Workers(run.threads) as workers:
        for name, near in workers.in_order(_calls(pairs, kind, files)):
            found.setdefault(name, Near()).__iadd__(near)
    return found


def _calls(
    pairs: Sequence[Pair], kind: type[_OnGrid], files: FilePool
) -> Iterator[Callable[[], tuple[str, Near]]]:
    for pair in pairs:
        owner = kind.owner(pair)
        if not isinstance(owner, QuantisedTensor) or not snaps(owner.stored_as):
            continue
        # Blocks are whole rows for both.
        if pair.job.columns in (1, owner.stored_as.columns):
            running = kind(pair, owner, files)
            yield from (partial(running.near, low, high) for low, high in running.looked_at())


class _OnGrid(RunningJob):
    """A job whose blocks are held against a grid."""

    def __init__(self, pair: Pair, owner: QuantisedTensor, files: FilePool) -> None:
        super().__init__(pair.job, files)
        self.merged = values_of(pair.merged, files)
        self._snap = snapping(owner.stored_as, files)
        self._width = owner.stored_as.columns
        self._slack = _OF_FEW_BITS if owner.stored_as.bits <= 4 else _SLACK

    @staticmethod
    @abstractmethod
    def owner(pair: Pair) -> TensorInfo:
        """The weight whose grid it is."""

    def looked_at(self) -> Iterator[tuple[int, int]]:
        """The blocks that are counted."""
        return blocks(self.length, block_elements(self._width))

    @abstractmethod
    def sides(
        self, before: torch.Tensor, expected: torch.Tensor, got: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What lies on the grid, and the values that it should be nearest to."""

    def near(self, low: int, high: int) -> tuple[str, Near]:
        self.prepare()
        before = self.load(low, high).clone()
        expected = self.add(before.clone(), low, high)
        raw = self.merged.bytes(low, high)
        got = torch.from_numpy(raw).view(TORCH[self.job.dtype]).to(self.work)
        there, aim = self.sides(before, expected, got)
        slack = (got.abs() + expected.abs() + (expected - before).abs()).mul_(self._slack)
        apart = (there - aim).abs()
        nearest = (self._snapped(aim, low) - aim).abs().add_(slack)
        outside = ~(apart <= nearest)
        away = there + 2 * (aim - there)
        doubled = (there - away).abs() > (self._snapped(away, low) - away).abs().add_(slack)
        return self.job.name, Near(high - low, int(outside.sum()), int(doubled.sum()))

    def _snapped(self, values: torch.Tensor, low: int) -> torch.Tensor:
        rows = values.float().nan_to_num(0.0).numpy().reshape(-1, self._width)
        self._snap(low // self._width, rows)
        return torch.from_numpy(rows.reshape(-1)).to(self.work)


class _OnOwnGrid(_OnGrid):
    @staticmethod
    def owner(pair: Pair) -> TensorInfo:
        return pair.merged

    def sides(
        self, before: torch.Tensor, expected: torch.Tensor, got: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return got, expected


class _OnGridOfBase(_OnGrid):
    @staticmethod
    def owner(pair: Pair) -> TensorInfo:
        return pair.job.source

    def looked_at(self) -> Iterator[tuple[int, int]]:
        every = list(super().looked_at())
        yield every[len(every) // 2]

    def sides(
        self, before: torch.Tensor, expected: torch.Tensor, got: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return before, got - (expected - before)
