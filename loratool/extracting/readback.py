"""Does base + adapter give a model? A second look, with the adapter as it is on disk.

The adapter is read and placed as a merge would do it, and every tensor of the result is held
against the model, in float32 and before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from loratool.adapters.reading import read_lora
from loratool.errors import VerifyError, listed
from loratool.extracting.counterparts import Counterpart
from loratool.merging.arithmetic import RunningJob
from loratool.merging.plan import Job
from loratool.merging.planning import build_plan
from loratool.merging.rounding import TORCH
from loratool.models.checkpoint import Checkpoint
from loratool.storage.tensors import FilePool, TensorInfo, blocks
from loratool.storage.values import values_of
from loratool.streams.scratch import scratch
from loratool.streams.workers import Workers


def distance(
    base: Checkpoint,
    adapter: Path,
    parts: Sequence[Counterpart],
    saved: Collection[str],
    advance: Callable[[int, str], None],
    threads: int | None,
) -> tuple[float, float]:
    """`(‖base + adapter - tuned‖, ‖tuned - base‖)` over the tensors that both models have.

    `saved` names the tensors that are in the adapter whole. Raises VerifyError if one of them does
    not come back as it is.
    """
    plan = build_plan(base, [read_lora(adapter)], [1.0], "base")
    goals = _goals(plan.jobs, parts)
    off = size = 0.0
    wrong = set(saved) - {part.name for _, part in goals}
    counted: dict[str, str] = {}
    with FilePool() as files, Workers(threads) as workers:
        calls = (
            partial(running.task, low, high)
            for running in (_Distance(job, part, files) for job, part in goals)
            for low, high in blocks(running.length, running.task_elements)
        )
        for name, part, own_off, own_size, nbytes in workers.in_order(calls):
            if counted.setdefault(part.name, name) == name:  # not a tied matrix a second time
                advance(nbytes, part.name)
                if part.tuned.is_float:
                    off, size = off + own_off, size + own_size
            if own_off and part.name in saved:
                wrong.add(part.name)
    if wrong:
        raise VerifyError(
            f"The adapter does not give back what it holds:\n{listed(sorted(wrong))}",
            "Nothing was written; please report this.",
        )
    return math.sqrt(off), math.sqrt(size)


def _goals(jobs: Sequence[Job], parts: Sequence[Counterpart]) -> list[tuple[Job, Counterpart]]:
    """The tensors of the merge and what each should be."""
    by_tensor: dict[str, Counterpart] = {}
    for part in parts:
        by_tensor |= {part.place.tensor: part, part.twin: part, part.name: part}
    found = [(job, by_tensor[job.name]) for job in jobs if job.name in by_tensor]
    # One of another shape that was left out cannot be compared.
    return [(job, part) for job, part in found if job.source.shape == part.tuned.shape]


class _Distance(RunningJob):
    """A job whose blocks are held against the tuned model instead of written."""

    def __init__(self, job: Job, part: Counterpart, files: FilePool) -> None:
        super().__init__(job, files)
        self.part = part
        sides = (job.source, part.tuned, part.base)
        self._sides = {info: values_of(info, files) for info in sides if info is not None}

    def task(self, low: int, high: int) -> tuple[str, Counterpart, float, float, int]:
        off = size = 0.0
        self.prepare()
        for first, last in blocks(high - low, self.block_elements):
            one, other = self._compare(low + first, low + last)
            off, size = off + one, size + other
        return self.job.name, self.part, off, size, (high - low) * self.part.tuned.itemsize

    def _compare(self, low: int, high: int) -> tuple[float, float]:
        if not self.part.tuned.is_float:  # not numbers: are the bytes the same?
            sides = (
                self._bytes(info, low, high).clone() for info in (self.source, self.part.tuned)
            )
            return float(not torch.equal(*sides)), 0.0
        tuned = self._elements(self.part.tuned, low, high).clone()
        size = 0.0
        if self.part.base is not None and self.part.is_comparable:
            size = _squared(self._elements(self.part.base, low, high).sub_(tuned))
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
