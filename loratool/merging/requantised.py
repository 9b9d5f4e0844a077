"""Parts of weights that are quantised again: their bytes, computed by range from merged rows.

A part is a tensor like any other, so that it is written, checked and recorded as others are; its
values are what the rows of the weight come to. Rows are merged anew for each part of a weight: so
nothing is held from one to the other, which lie far apart, or in different files.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from loratool.errors import MatchError
from loratool.merging.counts import Counts, MeasuredValues
from loratool.merging.plan import Edits, Job, Plan, make_job
from loratool.models.quantised.encoding.encoder import Encoder, LedEncoder
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.encoding.rounding import Codes
from loratool.models.quantised.scheme import Floats, QuantisedTensor
from loratool.storage.composed import Composed
from loratool.storage.tensors import BLOCK_ELEMENTS, Bytes, FilePool, TensorInfo, as_float32, blocks
from loratool.storage.values import Values, values_of

#: Elements of a weight of which a sample does not go through all rows.
_LARGE = 8 * BLOCK_ELEMENTS


@dataclass(frozen=True)
class PartAgain(Composed):
    """A part of a quantised weight, as it comes of what `job` makes of the weight.

    Name, dtype, shape and place are those that it had. `strip` is how many of its bytes are made
    together.
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
        return max(1, self.strip // self.itemsize)


def jobs_again(plan: Plan, edits: dict[str, Edits]) -> dict[str, Job]:
    """The jobs of all parts that change, by name, of the weights that are quantised again."""
    found: dict[str, Job] = {}
    if plan.treatment is None:
        return found
    for name in sorted(plan.treatment.back):
        weight = plan.treatment.base.weights[name]
        for job in parts_again(weight, make_job(plan, name, weight, edits[name])):
            found[job.name] = job
    return found


def parts_again(weight: QuantisedTensor, job: Job) -> list[Job]:
    """The jobs of the parts that change of a weight, of which `job` gives the values."""
    encoder = encoder_of(weight.stored_as)
    assert encoder is not None
    if job.source.shape != weight.shape:
        raise MatchError(
            f"{job.name}: the adapter replaces it by {list(job.source.shape)}, and it is stored in "
            f"{weight.stored_as.title} as {list(weight.shape)}.",
            "--quantised keep or plain takes it as it is.",
        )
    whole = replace(job, dtype="F32")
    sources = [_part_again(weight, role, whole, encoder) for role in encoder.sizes]
    return [Job(s.name, s.dtype, s, job.action, checked=False, of=whole) for s in sources]


def _part_again(weight: QuantisedTensor, role: str, job: Job, encoder: Encoder) -> PartAgain:
    part = weight.stored_as.parts[role]
    return PartAgain(
        part.name, part.dtype, part.shape, part.file, part.start, stamp=part.stamp,
        parts=(*weight.parts, job.source), job=job, weight=weight, role=role,
        strip=encoder.sizes[role],
    )  # fmt: skip


class Again(MeasuredValues):
    """The bytes of a part, made of strips of merged rows. Strips that do not change keep theirs."""

    def __init__(self, info: PartAgain, files: FilePool, is_sample: bool = False) -> None:
        from loratool.merging.arithmetic import RunningJob  # torch: about two seconds to import

        super().__init__(info)
        self._part = info
        self._rows = RunningJob(info.job, files)
        self._old = values_of(info.before, files)
        self._base: Values | None = None  # where it is not what the merge begins with
        if info.job.source is not info.weight:
            self._base = values_of(info.weight, files)
        encoder = encoder_of(info.weight.stored_as)
        assert encoder is not None
        encoder.open(files)
        self.encoder: Encoder = encoder
        self._columns = info.weight.shape[-1]
        self._count = math.prod(info.weight.shape[:-1])
        led = encoder if isinstance(encoder, LedEncoder) and encoder.lead is not None else None
        self._is_lead = led is not None and info.role == led.lead
        #: What the part goes by, where there is such a thing: who must know it, and its bytes.
        self._led = None if self._is_lead else led
        self._lead: Values | None = None
        if self._led is not None and self._led.lead is not None:
            leading = _part_again(info.weight, self._led.lead, info.job, encoder)
            # It takes all rows of a weight; of a large one a sample makes do with the base's.
            is_large = info.weight.numel > _LARGE
            self._lead = values_of(leading.before if is_sample and is_large else leading, files)
        # One thread makes it, before anything else.
        self._lock = threading.Lock()
        self._follows = False

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        self._read(low, high, raw, None)

    def read_measured(self, low: int, high: int, raw: Bytes, counts: Counts) -> None:
        self._read(low, high, raw, counts if self._part.is_codes else None)

    def _read(self, low: int, high: int, raw: Bytes, counts: Counts | None) -> None:
        size, strip = self.info.itemsize, self._part.strip
        begin, end = low * size, high * size
        first, last = begin // strip, -(-end // strip)
        for low_strip, high_strip in blocks(last - first, self._together):
            at = (first + low_strip) * strip
            made = self._strips(first + low_strip, first + high_strip, counts)
            start, stop = max(0, begin - at), min(len(made), end - at)
            raw[at + start - begin : at + stop - begin] = made[start:stop]

    @property
    def _height(self) -> int:
        """Rows of a strip."""
        return self._count if self._is_lead else self.encoder.strip

    @property
    def _together(self) -> int:
        """Strips that are made together. Where they consist of several groups it is one."""
        if self._height > self.encoder.group:
            return 1
        return max(1, BLOCK_ELEMENTS // (self._height * self._columns))

    @property
    def step(self) -> int:
        """Rows that are encoded together: whole groups, of about a block of elements."""
        group = self.encoder.group
        return max(1, BLOCK_ELEMENTS // (group * self._columns)) * group

    def _strips(self, first: int, last: int, counts: Counts | None) -> Bytes:
        """The bytes of strips `[first, last)`."""
        strip, size = self._part.strip, self.info.itemsize
        begin, end = first * strip, min(last * strip, self.info.nbytes)
        same: list[npt.NDArray[np.bool_]] = []
        joined = self.encoder.joined(self._part.role, self._pieces(first, last, counts, same))
        made = np.zeros(end - begin, np.uint8)
        made[: len(joined)] = joined
        unchanged = np.concatenate(same)
        if self._height > self.encoder.group:
            unchanged = np.array([unchanged.all()])
        if self._lead is None and unchanged.any():
            kept = np.repeat(unchanged, strip)[: len(made)]
            made[kept] = self._old.bytes(begin // size, end // size)[kept]
        return made

    def _pieces(
        self, first: int, last: int, counts: Counts | None, same: list[npt.NDArray[np.bool_]]
    ) -> Iterator[Codes]:
        """What the rows of strips `[first, last)` are in the part; into `same`, which of their
        groups are as they were."""
        begin, end = first * self._height, min(last * self._height, self._count)
        for low, high in blocks(end - begin, self.step):
            codes, unchanged = self.encoded(begin + low, begin + high, counts)
            same.append(unchanged)
            yield codes

    def encoded(
        self, first: int, last: int, counts: Counts | None
    ) -> tuple[Codes, npt.NDArray[np.bool_]]:
        """What whole groups of rows, `[first, last)`, are in the part, and which of them are as
        they were."""
        self._follow()
        group = self.encoder.group
        values, before = self._merged(first, last)
        changed = (values != before).any(1)
        same = ~np.logical_or.reduceat(changed, np.arange(0, last - first, group))
        stand_for = np.empty_like(values) if counts is not None else None
        codes = self.encoder.encode(self._part.role, first, values, before, stand_for)
        if counts is not None and stand_for is not None:
            if self._lead is None:
                kept = np.repeat(same, group)[: last - first]
                stand_for[kept] = before[kept]
            _count(before, values, stand_for, counts)
        return codes, same

    def _follow(self) -> None:
        """Let the encoder know what the others go by."""
        if self._led is None or self._lead is None or self._follows:
            return
        with self._lock:
            if not self._follows:
                self._led.follow(self._lead.bytes(0, self._lead.length))
                self._follows = True

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
