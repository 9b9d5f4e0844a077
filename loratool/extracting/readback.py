"""Does base + adapter give a model? A second look, with the adapter as it is on disk.

The adapter is read and placed as a merge would do it, and every tensor of the result is held
against the model, in float32 and before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loratool.adapters.reading import read_lora
from loratool.errors import VerifyError, listed
from loratool.extracting.counterparts import Counterpart, Counterparts
from loratool.merging.arithmetic import RunningJob
from loratool.merging.plan import Job
from loratool.merging.planning import build_plan
from loratool.merging.rounding import TORCH
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.assembly import assembled
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.table import Segment
from loratool.models.quantised.treatment import AS_IT_WAS_TRAINED
from loratool.storage.tensors import FilePool, TensorInfo, blocks
from loratool.storage.values import values_of
from loratool.streams.scratch import scratch
from loratool.streams.workers import Workers


def distance(
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: Path,
    pairs: Counterparts,
    saved: Collection[str],
    advance: Callable[[int, str], None],
    threads: int | None,
) -> tuple[float, float]:
    """`(‖base + adapter - tuned‖, ‖tuned - base‖)` over the tensors that both models have.

    `saved` names the tensors that are in the adapter whole. Raises VerifyError if one of them does
    not come back as it is.
    """
    plan = build_plan(base, [read_lora(adapter)], [1.0], "base", quantised=AS_IT_WAS_TRAINED)
    goals = list(_goals(plan.jobs, Layout(base), Layout(tuned), pairs))
    off = size = 0.0
    wrong = set(saved) - {name for goal in goals for name in goal.names}
    counted: dict[str, str] = {}
    with FilePool() as files, Workers(threads) as workers:
        calls = (
            partial(running.task, low, high)
            for running in (_Distance(goal, files) for goal in goals)
            for low, high in blocks(running.length, running.task_elements)
        )
        for goal, own_off, own_size, nbytes in workers.in_order(calls):
            name = goal.names[0] if goal.alone else goal.job.name
            if counted.setdefault(name, goal.job.name) == goal.job.name:  # a tied matrix once
                advance(nbytes, name)
                if goal.tuned.is_float:
                    off, size = off + own_off, size + own_size
            if own_off:
                wrong |= set(saved) & set(goal.names)
    if wrong:
        raise VerifyError(
            f"The adapter does not give back what it holds:\n{listed(sorted(wrong))}",
            "Nothing was written; please report this.",
        )
    return math.sqrt(off), math.sqrt(size)


@dataclass(frozen=True)
class _Goal:
    """A tensor of the merge, what it should be, and what the base has if that can be compared.

    `names` are the parameters in memory that it is of, `alone` says that it is all of one.
    """

    job: Job
    base: TensorInfo | None
    tuned: TensorInfo
    names: list[str]
    alone: bool


def _goals(
    jobs: Sequence[Job], layout: Layout, own: Layout, pairs: Counterparts
) -> Iterator[_Goal]:
    """The tensors of the merge and what each should be, the tuned model's cut as the base's are."""
    by_tensor: dict[str, Counterpart] = {}
    for part in pairs.found:
        by_tensor |= {part.place.tensor: part, part.twin: part, part.name: part}
    for job in jobs:
        segments = layout.holdings.names.segments(job.name)
        parts = [by_tensor[s.memory] for s in segments if s.memory in by_tensor]
        if not parts:
            continue
        names = [part.unit for part in parts]
        # It is one parameter as it lies, perhaps under another name.
        plain = list(segments) == [Segment(segments[0].memory)]
        if plain and parts[0].stack is None:
            # One of another shape that was left out cannot be compared.
            if job.source.shape == parts[0].tuned.shape:
                before = parts[0].base if parts[0].is_comparable else None
                yield _Goal(job, before, parts[0].tuned, names, True)
            continue
        try:
            name = pairs.in_tuned(job.name)
            tuned, _ = assembled(own.holdings, name, job.source.shape, layout.holdings)
        except MisfitError as error:
            if all(part.fate == "left" for part in parts):
                continue
            raise VerifyError(
                f"{job.name}: what the tuned model has in its place is not known: {error}.",
                "Nothing was written; extract without --verify, and see what verify says of a "
                "merge.",
            ) from None
        yield _Goal(job, layout.base.tensors[job.name], tuned, names, False)


class _Distance(RunningJob):
    """A job whose blocks are held against the tuned model instead of written."""

    def __init__(self, goal: _Goal, files: FilePool) -> None:
        super().__init__(goal.job, files)
        self.goal = goal
        sides = (goal.job.source, goal.tuned, goal.base)
        self._sides = {info: values_of(info, files) for info in sides if info is not None}

    def task(self, low: int, high: int) -> tuple[_Goal, float, float, int]:
        off = size = 0.0
        self.prepare()
        for first, last in blocks(high - low, self.block_elements):
            one, other = self._compare(low + first, low + last)
            off, size = off + one, size + other
        return self.goal, off, size, (high - low) * self.goal.tuned.itemsize

    def _compare(self, low: int, high: int) -> tuple[float, float]:
        goal = self.goal.tuned
        if not goal.is_float:  # not numbers: are the bytes the same?
            sides = (self._bytes(info, low, high).clone() for info in (self.source, goal))
            return float(not torch.equal(*sides)), 0.0
        tuned = self._elements(goal, low, high).clone()
        size = 0.0
        if self.goal.base is not None:
            size = _squared(self._elements(self.goal.base, low, high).sub_(tuned))
        merged = self.add(self.load(low, high), low, high)
        return _squared(merged.sub_(tuned)), size

    def _elements(self, info: TensorInfo, low: int, high: int) -> torch.Tensor:
        values = scratch.get("side", high - low, self.work)
        return values.copy_(self._bytes(info, low, high).view(TORCH[info.dtype]))

    def _bytes(self, info: TensorInfo, low: int, high: int) -> torch.Tensor:
        raw = scratch.get("raw", (high - low) * info.itemsize, torch.uint8)
        self._sides[info].read_into(low, high, raw.numpy())
        return raw


def _squared(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
