"""Parts of weights that are quantised again: their bytes, computed by range from merged rows.

A part is a tensor like any other, so that it is written, checked and recorded as others are; its
values are what the rows of the weight come to. Rows are merged anew for each part of a weight: so
nothing is held from one to the other, which lie far apart, or in different files.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from loratool.merging.counts import Counts, MeasuredValues
from loratool.merging.plan import Edits, Job, Plan, make_job
from loratool.models.quantised.encoding.encoder import Codes, Encoder
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.scheme import Floats, QuantisedTensor
from loratool.storage.composed import Composed
from loratool.storage.tensors import BLOCK_ELEMENTS, Bytes, FilePool, TensorInfo, as_float32, blocks
from loratool.storage.values import Values, values_of


@dataclass(frozen=True)
class PartAgain(Composed):
    """A part of a quantised weight, as it comes of what `job` makes of the weight.

    Name, dtype, shape and place are those that it had. `strip` is the number of bytes that a group
    of rows has in it, 0 where it is made as a whole.
    """

    job: Job = field(kw_only=True)
    weight: QuantisedTensor = field(kw_only=True)
    role: str = field(kw_only=True)
    strip: int = field(kw_only=True)

    @property
    def before(self) -> TensorInfo:
        """What the base has in its place."""
        return self.weight.stored_as.parts[self.role]

    @property
    def is_codes(self) -> bool:
        """Whether these are the codes, beside which the other parts are scales."""
        return self.before is self.weight.stored_as.main

    @property
    def disk_bytes(self) -> int:
        return self.nbytes

    @property
    def run(self) -> int:
        return self.strip // self.itemsize or max(1, self.numel)


def jobs_again(plan: Plan, edits: dict[str, Edits]) -> dict[str, Job]:
    """The jobs of all parts that change, by name, of the weights that are quantised again."""
    found: dict[str, Job] = {}
    if plan.treatment is None:
        return found
    for name in sorted(plan.treatment.back):
        weight = plan.treatment.base.weights[name]
        scheme = weight.stored_as
        encoder = encoder_of(scheme)
        assert encoder is not None
        job = replace(make_job(plan, name, weight, edits[name]), dtype="F32")
        for role, strip in encoder.strips.items():
            part = scheme.parts[role]
            source = PartAgain(
                part.name, part.dtype, part.shape, part.file, part.start, stamp=part.stamp,
                parts=(*scheme.parts.values(), job.source), job=job, weight=weight, role=role,
                strip=strip,
            )  # fmt: skip
            found[part.name] = Job(part.name, part.dtype, source, job.action, checked=False, of=job)
    return found


class Again(MeasuredValues):
    """The bytes of a part, made of groups of merged rows. Groups that do not change keep theirs."""

    def __init__(self, info: PartAgain, files: FilePool) -> None:
        from loratool.merging.arithmetic import RunningJob  # torch: about two seconds to import

        super().__init__(info)
        self._part = info
        self._rows = RunningJob(info.job, files)
        self._kept = values_of(info.before, files)
        self._base: Values | None = None  # where it is not what the merge begins with
        if info.job.source is not info.weight:
            self._base = values_of(info.weight, files)
        encoder = encoder_of(info.weight.stored_as)
        assert encoder is not None
        encoder.open(files)
        self.encoder: Encoder = encoder
        self._columns = info.weight.shape[-1]
        self._count = math.prod(info.weight.shape[:-1])
        # One thread makes what is made as a whole.
        self._lock = threading.Lock()
        self._whole: tuple[Bytes, Counts] | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        self._read(low, high, raw, None)

    def read_measured(self, low: int, high: int, raw: Bytes, counts: Counts) -> None:
        self._read(low, high, raw, counts if self._part.is_codes else None)

    def _read(self, low: int, high: int, raw: Bytes, counts: Counts | None) -> None:
        size, strip = self.info.itemsize, self._part.strip
        begin, end = low * size, high * size
        if not strip:
            whole, found = self._made_whole()
            raw[:] = whole[begin:end]
            if counts is not None and low == 0:
                counts += found
            return
        first, last = begin // strip, -(-end // strip)
        # Where rows have few bytes in a part, a piece of it is of very many.
        for low, high in blocks(last - first, self.step):
            at = (first + low) * strip
            made = self._strips(first + low, first + high, counts)
            start, stop = max(0, begin - at), min(len(made), end - at)
            raw[at + start - begin : at + stop - begin] = made[start:stop]

    def _strips(self, first: int, last: int, counts: Counts | None) -> Bytes:
        """The bytes of groups `[first, last)`."""
        strip, size = self._part.strip, self.info.itemsize
        codes, same = self.encoded(first, last, counts)
        begin, end = first * strip, min(last * strip, self.info.nbytes)
        made = np.zeros(end - begin, np.uint8)
        joined = self.encoder.joined(self._part.role, [codes])
        made[: len(joined)] = joined
        if same.any():
            as_they_were = np.repeat(same, strip)[: len(made)]
            made[as_they_were] = self._kept.bytes(begin // size, end // size)[as_they_were]
        return made

    def _made_whole(self) -> tuple[Bytes, Counts]:
        with self._lock:
            if self._whole is None:
                counts, pieces, same = Counts(), [], True
                for first, last in blocks(self.groups, self.step):
                    piece, unchanged = self.encoded(first, last, counts)
                    pieces.append(piece)
                    same = same and bool(unchanged.all())
                made = self._kept.bytes(0, self._kept.length)
                if not same:
                    joined = self.encoder.joined(self._part.role, pieces)
                    made[: len(joined)] = joined
                self._whole = made, counts
            return self._whole

    @property
    def groups(self) -> int:
        """How many groups the weight's rows make."""
        return -(-self._count // self.encoder.group)

    @property
    def step(self) -> int:
        """Groups of about a block of elements."""
        return max(1, BLOCK_ELEMENTS // (self.encoder.group * self._columns))

    def encoded(
        self, first: int, last: int, counts: Counts | None
    ) -> tuple[Codes, npt.NDArray[np.bool_]]:
        """What groups `[first, last)` are in the part, and which of them are as they were."""
        group = self.encoder.group
        begin, end = first * group, min(last * group, self._count)
        values, before = self._merged(begin, end)
        changed = (values != before).any(1)
        same = ~np.logical_or.reduceat(changed, np.arange(0, end - begin, group))
        stand_for = np.empty_like(values) if counts is not None else None
        codes = self.encoder.encode(self._part.role, begin, values, stand_for)
        if counts is not None and stand_for is not None:
            kept = np.repeat(same, group)[: end - begin]
            stand_for[kept] = before[kept]
            _count(before, values, stand_for, counts)
        return codes, same

    def _merged(self, first: int, last: int) -> tuple[Floats, Floats]:
        """Rows `[first, last)` of the merged weight, in this thread's scratch, and of the base."""
        low, high = first * self._columns, last * self._columns
        self._rows.prepare()
        raw = np.empty((high - low) * self._rows.source.itemsize, np.uint8)
        values = self._rows.load(low, high, raw)
        merged = self._rows.add(values, low, high).float().numpy()
        if not np.isfinite(merged).all():
            self._rows.explain_values()
        if self._base is not None:
            before = self._base.floats(low, high)
        else:
            before = as_float32(raw, self._rows.source.dtype)
        return merged.reshape(-1, self._columns), before.reshape(-1, self._columns)


def _count(before: Floats, merged: Floats, stand_for: Floats, counts: Counts) -> None:
    """Add what rows lose of their delta."""
    delta = (merged - before).reshape(-1)
    realised = (stand_for - before).reshape(-1)
    total, kept = _dot(delta, delta), _dot(realised, delta)
    realised -= delta
    missed = _dot(realised, realised)
    counts.again += total
    counts.kept += kept
    counts.missed += missed
    counts.delta += total
    counts.lost += missed


def _dot(one: Floats, other: Floats) -> float:
    """The scalar product, in pieces whose sums are float64."""
    size = 1 << 12
    even = len(one) // size * size
    pieces = np.einsum("ij,ij->i", one[:even].reshape(-1, size), other[:even].reshape(-1, size))
    rest = np.dot(one[even:].astype(np.float64), other[even:].astype(np.float64))
    return float(pieces.sum(dtype=np.float64) + rest)


@values_of.register
def _(info: PartAgain, files: FilePool) -> Values:
    return Again(info, files)
