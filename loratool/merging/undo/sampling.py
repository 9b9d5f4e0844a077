"""Look at a sample of a plan's blocks to say beforehand what the whole would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from loratool.merging.arithmetic import RunningJob
from loratool.merging.plan import Job, Plan
from loratool.merging.rounding import TORCH, ulp
from loratool.merging.undo.predicted import predicted_jobs
from loratool.merging.undo.recording import RecordedMerging, RecordedTask
from loratool.models.quantised.base import as_stored
from loratool.storage.tensors import FilePool
from loratool.streams.workers import Workers

#: Blocks in a sample.
_SAMPLES = 48

#: What a tensor takes in the undo file's header and table, about.
_ROW_BYTES = 250


def undo_bytes(plan: Plan) -> int:
    """About how many bytes the undo file of a merge will have."""
    of_base = predicted_jobs(plan)
    # Deriving what was taken off would decompose matrices, and it costs little more than rounding.
    recorded = [
        replace(job, taken=tuple(t for t in job.taken if t.how == "given"))
        for job, counterpart in of_base.values()
        if not counterpart.is_copied(job)
    ]
    places = {job.name: counterpart for job, counterpart in of_base.values()}
    stored = as_stored(plan.base).tensors
    whole = [info for name, info in stored.items() if name not in of_base]
    coded = elements = 0
    with FilePool() as files, Workers(1) as workers:
        for job, place in _places(recorded):
            part = RecordedMerging(job, places[job.name], files)
            low, high = _block(part, place)
            task = RecordedTask(part, low=low, high=high, workers=workers)
            task.compute(low, high, np.empty((high - low) * part.itemsize, np.uint8))
            task.finish()
            if task.base is not None:
                workers.give(task.base)
            elements, coded = elements + high - low, coded + len(task.chunk)
    total = sum(job.source.numel for job in recorded)
    # A replaced tensor is stored compressed, to about three quarters for trained weights.
    kept = sum(3 * info.nbytes // 4 for info in whole)
    pairs = [t.delta.factors for job in plan.jobs for t in job.taken]
    taken = sum(4 * factors.rank * sum(factors.shape) for factors in pairs)
    rows = _ROW_BYTES * len(stored)
    return round(coded * total / max(1, elements)) + kept + taken + rows


def changed_by_cycle(forward: Plan, backward: Plan) -> float:
    """The share of adapted weights that differ after the deltas are added and taken away again.

    Both plans are of the merged model, `backward` with negated weights. The base is not at hand, so
    weights that may have been its are made: the merged ones without the delta, and without what
    rounding may have moved them by.
    """
    there = {job.name: job for job in forward.jobs}
    back = [job for job in backward.jobs if job.is_arithmetic]
    generator = torch.Generator().manual_seed(0)
    changed = elements = 0
    with FilePool() as files:
        for job, place in _places(back):
            adding, subtracting = RunningJob(there[job.name], files), RunningJob(job, files)
            low, high = _block(subtracting, place)
            adding.prepare()
            subtracting.prepare()
            values = subtracting.load(low, high).clone()
            delta = values - subtracting.add(values.clone(), low, high)
            moved = (torch.rand(len(values), generator=generator) - 0.5) * ulp(
                values, job.source.dtype
            )
            before = (values.double() + moved - delta.double()).to(TORCH[job.dtype])
            merged = adding.add(before.to(adding.work, copy=True), low, high)
            merged = merged.to(TORCH[job.source.dtype]).to(adding.work, copy=True)
            after = subtracting.add(merged, low, high).to(TORCH[job.dtype])
            changed += int((after != before).sum())
            elements += high - low
    return changed / max(1, elements)


def _places(jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
    """Elements spread evenly over all tensors together, at most one to a block of samples."""
    spacing = max(1, sum(job.source.numel for job in jobs) // _SAMPLES)
    end = 0
    for job in jobs:
        begin, end = end, end + job.source.numel
        for place in range(-(-begin // spacing) * spacing, end, spacing):
            yield job, place - begin


def _block(part: RunningJob, place: int) -> tuple[int, int]:
    """The block of elements around `place`."""
    low = place // part.block_elements * part.block_elements
    return low, min(low + part.block_elements, part.length)
