"""The plan of a merge: what becomes of every tensor. Values only; `planning` makes them.

A plan is a list of jobs per output shard, one job per output tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, TokenRows
from loratool.adapters.changed import ChangedTensor
from loratool.adapters.weighting import Weight
from loratool.dtypes import DTYPE_BITS, MODEL_DTYPES
from loratool.merging.match import Delta
from loratool.merging.replication import original
from loratool.models.checkpoint import Checkpoint
from loratool.models.config import Rewriting
from loratool.models.layouts.names import is_legacy_buffer
from loratool.models.quantised.base import as_stored
from loratool.models.quantised.treatment import Treatment, leftover
from loratool.notices import Notice
from loratool.paths import EVERYTHING, Choice
from loratool.storage.header import build_header
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class BiasTerm:
    """`b += scale·lora_B.bias`, with the user's weight in the scale."""

    info: TensorInfo
    scale: float


@dataclass(frozen=True)
class Taken:
    """What an initialisation took off a weight before training, rounded to the weight's dtype.

    `how` is "pissa" or "olora" where it is derived from the weight, with place and rank of the
    trained `delta`; "given" where `delta` itself is it: the factors before training.
    """

    how: str
    delta: Delta


@dataclass(frozen=True)
class Job:
    """How one output tensor comes about.

    `source` is read (from the base, or from an adapter that replaces the tensor), what was `taken`
    off it before training is, the deltas, bias terms and token rows are applied in float32, and the
    result is rounded once to `dtype`.
    `action` names it for people: copy, cast, merge, replace or add.
    """

    name: str
    dtype: str
    source: TensorInfo
    action: str
    deltas: tuple[Delta, ...] = ()
    biases: tuple[BiasTerm, ...] = ()
    rows: tuple[TokenRows, ...] = ()
    taken: tuple[Taken, ...] = ()
    #: A copy of the embedding that becomes a head of its own.
    untied: bool = False
    #: False for integers and for legacy buffers, which may hold -inf by design.
    checked: bool = True
    #: Of a part of a weight that is quantised again: the job that gives the weight's values.
    of: Job | None = None

    @property
    def columns(self) -> int:
        """Elements of a stored row, where rows matter; 1 where they do not."""
        if self.deltas:
            return self.deltas[0].place.matrix(self.source.shape)[1]
        return math.prod(self.source.shape[1:]) if self.rows else self.source.run

    @property
    def is_arithmetic(self) -> bool:
        return bool(self.deltas or self.biases or self.rows)

    @property
    def is_sum(self) -> bool:
        """True if something is added, False if elements are replaced or nothing happens."""
        return bool(self.deltas or self.biases)

    @property
    def before(self) -> TensorInfo | None:
        """The base's own tensor where the source is one that a function makes of it."""
        return self.source.before if isinstance(self.source, ChangedTensor) else None

    @property
    def is_change(self) -> bool:
        """True if the result is the base's tensor with a change, so that the two can be compared:
        a sum, or what a function makes of it."""
        return self.is_sum or self.before is not None

    @property
    def is_adapted(self) -> bool:
        """True if an adapter changes or brings the tensor; a head that is untied it does not."""
        return self.is_arithmetic or (self.action in ("replace", "add") and not self.untied)

    @property
    def is_verbatim(self) -> bool:
        return not self.is_arithmetic and self.dtype == self.source.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.source.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class OutputShard:
    """One output file and everything that it is made from: all that another process needs."""

    name: str
    jobs: tuple[Job, ...]
    #: What it says of itself beside its format.
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return build_header(
            [(j.name, j.dtype, j.source.shape) for j in self.jobs],
            {**self.metadata, "format": "pt"},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def sources(self) -> set[Path]:
        """The files that hold the tensors it begins with."""
        return {file for job in self.jobs for file in job.source.files}


@dataclass
class Plan:
    """Everything a merge will do. `shards` maps output files to jobs in the order of their data."""

    base: Checkpoint
    adapters: list[Adapter]
    weights: list[Weight]
    dtype: str
    allow_unmatched: bool = False
    components: tuple[str, ...] = ()
    #: Which of the adapters' parts the user wants; the others are not in `adapters`.
    choice: Choice = EVERYTHING
    #: The adapter before training, where it says what was taken off the base.
    initial: Adapter | None = None
    shards: dict[str, list[Job]] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    #: What becomes of the base's quantisation; None where it has none.
    treatment: Treatment | None = None
    notices: list[Notice] = field(default_factory=list)
    modules: int = 0
    #: The most bytes of tensors in a file, where other files than the base's are written.
    max_shard_size: int | None = None

    @property
    def rewriting(self) -> Rewriting | None:
        """What the output's files must say differently of quantisation."""
        if self.treatment is not None:
            return self.treatment.rewriting()
        return leftover(original(self.base))

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    def is_of_base(self, source: TensorInfo) -> bool:
        """Whether a job's source is a tensor of the base, as its files hold it or dequantised."""
        models = self.base, as_stored(original(self.base))
        return any(source is model.tensors.get(source.name) for model in models)

    @property
    def weight_jobs(self) -> list[Job]:
        """The jobs that give values, each once, however many tensors a weight is stored in."""
        return list({id(job.of or job): job.of or job for job in self.jobs}.values())

    @property
    def outputs(self) -> list[OutputShard]:
        """What is to be made, file by file; each by itself, in any order, on any machine."""
        metadata = self.treatment.metadata if self.treatment is not None else {}
        return [OutputShard(name, tuple(jobs), metadata) for name, jobs in self.shards.items()]

    def files_for(self, shards: Iterable[OutputShard]) -> list[str]:
        """The names of the files of the base that these shards are made from."""
        folder = self.base.folder.path
        files = {path for shard in shards for path in shard.sources}
        return sorted(path.name for path in files if path.parent == folder)

    @property
    def inputs(self) -> list[Adapter]:
        """The adapters, and what one of them was before training."""
        return [*self.adapters, *([self.initial] if self.initial else [])]

    @property
    def bytes_to_read(self) -> int:
        return sum(j.source.disk_bytes for j in self.jobs) + sum(a.nbytes for a in self.inputs)

    @property
    def bytes_to_write(self) -> int:
        return sum(j.nbytes for j in self.jobs)

    def refuse_changed(self) -> None:
        """Raise FileError if a file of the base or of an adapter changed since it was read."""
        for folder in (self.base.folder, *(adapter.folder for adapter in self.inputs)):
            folder.refuse_changed()

    def counts(self) -> dict[str, int]:
        """Number of tensors by action."""
        found = dict.fromkeys(("merge", "replace", "add", "cast", "copy"), 0)
        for job in self.jobs:
            found[job.action] += 1
        return found


@dataclass
class Edits:
    """What all adapters together do to one tensor."""

    deltas: list[Delta] = field(default_factory=list)
    biases: list[BiasTerm] = field(default_factory=list)
    rows: list[TokenRows] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    replacement: TensorInfo | None = None

    def __bool__(self) -> bool:
        return bool(self.deltas or self.biases or self.rows or self.replacement)


def make_job(plan: Plan, name: str, source: TensorInfo, edits: Edits, action: str = "") -> Job:
    """The job that turns `source`, a tensor of the base or one like it, into output `name`."""
    treatment = plan.treatment
    if treatment is not None and treatment.base.is_part(source):
        return Job(name, source.dtype, source, "copy", checked=False)
    base_dtype = source.dtype
    if treatment is not None and name in treatment.base.weights:
        base_dtype = treatment.dtype
    if edits.replacement is not None:
        source = edits.replacement
    keep = is_legacy_buffer(name, source.shape) or not source.is_float
    dtype = MODEL_DTYPES[plan.dtype] or base_dtype
    if keep:
        dtype = source.dtype
    if not action:
        if edits.deltas or edits.biases or edits.rows:
            action = "merge"
        elif edits.replacement is not None:
            action = "replace"
        else:
            action = "copy" if dtype == source.dtype else "cast"
    return Job(
        name, dtype, source, action, tuple(edits.deltas), tuple(edits.biases), tuple(edits.rows),
        tuple(edits.taken), checked=not keep,
    )  # fmt: skip
