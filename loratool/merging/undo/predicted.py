"""Which tensors of a base's files can be predicted from what a merge made, and from which jobs."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.timesweight import is_of_weight
from loratool.errors import RestoreError, listed
from loratool.merging.plan import Job, Plan
from loratool.merging.undo.file import Undo
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import as_stored
from loratool.models.quantised.encoding.snapping import row_bytes
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Predicted:
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


def predicted_by(job: Job, base: Checkpoint) -> Predicted | None:
    """What of a base can be predicted from what a job made; None where nothing can."""
    if is_of_weight(delta.factors for delta in job.deltas):
        return None  # what was added is known with the base alone
    source = job.source
    if source is as_stored(base).tensors.get(job.name):
        return Predicted(source)
    if not isinstance(source, QuantisedTensor) or source is not base.tensors.get(job.name):
        return None
    scheme = source.stored_as
    size = row_bytes(scheme)
    if not size or job.columns != scheme.columns:
        return None
    return Predicted(scheme.main, size // scheme.main.itemsize, scheme.columns)


def predicted_jobs(plan: Plan) -> dict[str, tuple[Job, Predicted]]:
    """The jobs from whose output tensors of the base's files are predicted, by the name of that
    tensor. Others are not in the output."""
    found = ((job, predicted_by(job, plan.base)) for job in plan.jobs)
    return {of_base.info.name: (job, of_base) for job, of_base in found if of_base is not None}


def refuse_other_tensors(plan: Plan, merged: Checkpoint, undo: Undo) -> None:
    """Raise RestoreError where `merged` has other tensors than the merge wrote: the undo file does
    not fit a copy in another dtype."""
    wrong = []
    jobs = predicted_jobs(plan)
    for name, tensor in undo.tensors.items():
        if tensor.whole:
            continue
        job = jobs[name][0] if name in jobs else None
        info = merged.tensors.get(job.name) if job is not None else None
        if info is None or job is None:
            wrong.append(f"{name} is missing")
        elif (info.dtype, info.shape) != (job.dtype, job.source.shape):
            wrong.append(f"{info}, but {job.dtype} {list(job.source.shape)} was written")
    if wrong:
        raise RestoreError(
            f"{merged.label} is not as the merge wrote it:\n{listed(wrong)}",
            "Use the directory that `loratool merge --reversible` wrote. `--subtract` does "
            "without the undo file, but not exactly.",
        )
