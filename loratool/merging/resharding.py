"""Other output files than the base's: its tensors in their order, so many bytes to a file.

Index, undo file, verify and the shares of workers go by a plan's shards, so nothing else need know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loratool.dtypes import DTYPE_BITS
from loratool.merging.plan import Job, Plan
from loratool.storage.filenames import shard_names


def reshard(plan: Plan, most: int) -> None:
    """Give the output of `plan` files with at most `most` bytes of tensors each.

    A tensor that is larger has a file of its own. The parts that a quantised weight is stored in
    stay in one file, because programs that load them look there for all of them.
    """
    parts = list(_filled(_together(plan), most))
    plan.max_shard_size = most
    plan.shards = {
        name: sorted(jobs, key=lambda job: -DTYPE_BITS[job.dtype])
        for name, jobs in zip(shard_names(len(parts)), parts, strict=True)
    }


def _together(plan: Plan) -> list[list[Job]]:
    """The jobs in their order, those of one weight as one."""
    owners = plan.treatment.base.owners if plan.treatment is not None else {}
    found: dict[str, list[Job]] = {}
    for job in plan.jobs:
        found.setdefault(owners.get(job.name, job.name), []).append(job)
    return list(found.values())


def _filled(units: Iterable[list[Job]], most: int) -> Iterator[list[Job]]:
    """Files, each filled with what follows until the next unit does not fit any more."""
    jobs: list[Job] = []
    nbytes = 0
    for unit in units:
        size = sum(job.nbytes for job in unit)
        if jobs and nbytes + size > most:
            yield jobs
            jobs, nbytes = [], 0
        jobs += unit
        nbytes += size
    yield jobs
