"""Which tensors of a base's files can be predicted from what a merge made, and from which jobs."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.plan import Job, Plan
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import as_stored
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Counterpart:
    """The tensor of the base's files that is predicted from what a job made: its source or, of a
    quantised weight that was opened, the codes of that.

    `size` elements of it are as many of the job as `columns`: a row, or one.
    """

    info: TensorInfo
    size: int = 1
    columns: int = 1

    def is_copied(self, job: Job) -> bool:
        """Whether the job writes it as it is."""
        return job.is_verbatim and job.source is self.info

    def span(self, low: int, high: int) -> tuple[int, int]:
        """Its elements for elements `[low, high)` of the job, whole rows."""
        return low // self.columns * self.size, high // self.columns * self.size

    def span_of_job(self, low: int, high: int) -> tuple[int, int]:
        """The job's elements for its own ones `[low, high)`, whole rows."""
        return low // self.size * self.columns, high // self.size * self.columns


def counterpart(base: Checkpoint, job: Job) -> Counterpart | None:
    """What of a base can be predicted from what a job made; None where nothing can."""
    source = job.source
    if source is as_stored(base).tensors.get(source.name):
        return Counterpart(source)
    if not isinstance(source, QuantisedTensor) or source is not base.tensors.get(source.name):
        return None
    scheme = source.stored_as
    if not scheme.row_bytes or job.columns != scheme.columns:
        return None
    return Counterpart(scheme.main, scheme.row_bytes // scheme.main.itemsize, scheme.columns)


def predicted_jobs(plan: Plan) -> dict[str, tuple[Job, Counterpart]]:
    """The jobs from whose output tensors of the base's files are predicted, by the name of that
    tensor. Others are not in the output."""
    found = ((job, counterpart(plan.base, job)) for job in plan.jobs)
    return {of_base.info.name: (job, of_base) for job, of_base in found if of_base is not None}
