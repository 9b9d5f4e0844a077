"""Compare merged tensors with what they should be: the merge's stream, with sums where it writes.

For every block the expected values x = W + Δ are computed as a merge does, rounded once to the
dtype that the merged tensor has, and held against its bytes. Where they differ, the deviation is
measured: is it within what the order of a float32 sum changes, within what one more rounding to
half precision changes, or outside of both?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loratool.arithmetic import TORCH, RunningJob, narrowed, scratch
from loratool.checkpoint.residual import find
from loratool.checkpoint.tensors import FilePool, TensorInfo, blocks, read_raw
from loratool.findings import BINS, Stats
from loratool.plan import Job
from loratool.workers import Bytes, Workers

Values = npt.NDArray[np.floating[Any]]

#: Bits of the fraction, and exponent of the smallest normal number.
_FORMATS = {"F16": (10, -14), "BF16": (7, -126), "F32": (23, -126), "F64": (52, -1022)}

#: How often the order of a sum may move its result by half a unit of the working dtype.
_NOISE = 16.0

#: `progress(bytes, tensor)`: so many more bytes of the merged model are compared.
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Pair:
    """A merged tensor and the job that should give it; the job's dtype is the tensor's."""

    job: Job
    merged: TensorInfo


def compare(
    pairs: Sequence[Pair], progress: Progress, threads: int | None = None
) -> dict[str, Stats]:
    """The statistics of every pair, by the job's name."""
    found: dict[str, Stats] = {}
    with FilePool() as files, Workers(threads) as workers:
        for name, nbytes, stats in workers.in_order(_calls(pairs, files)):
            found.setdefault(name, Stats()).__iadd__(stats)
            progress(nbytes, name)
    for pair in pairs:
        found.setdefault(pair.job.name, Stats())  # tensors without elements
    return found


def _calls(
    pairs: Sequence[Pair], files: FilePool
) -> Iterator[Callable[[], tuple[str, int, Stats]]]:
    for pair in pairs:
        running = _Comparing(pair, files)
        for low, high in blocks(running.length, running.task_elements):
            yield partial(running.task, low, high)


class _Comparing(RunningJob):
    """A job whose blocks are compared instead of written."""

    def __init__(self, pair: Pair, files: FilePool) -> None:
        super().__init__(pair.job, files)
        self.merged = pair.merged
        self._merged_strided: Bytes | None = None
        #: The half-precision dtypes that another tool may have rounded to on the way.
        self.halves = ["BF16", "F16"]
        if pair.job.is_arithmetic:
            seen = {d.module.a.dtype for d in pair.job.deltas}
            seen |= {pair.job.dtype, self.source.dtype}
            self.halves = sorted(seen & {"F16", "BF16"})

    def task(self, low: int, high: int) -> tuple[str, int, Stats]:
        stats = Stats()
        for first, last in blocks(high - low, self.block_elements):
            self._compare(low + first, low + last, stats)
        return self.job.name, (high - low) * self.itemsize, stats

    def _read_merged(self, low: int, high: int, raw: Bytes) -> None:
        size = self.itemsize
        if self.merged.strides is None:
            self.files.read_into(self.merged.file, self.merged.start + low * size, raw.data)
            return
        with self._lock:
            if self._merged_strided is None:
                self._merged_strided = read_raw(self.merged, self.files)
        raw[:] = self._merged_strided[low * size : high * size]

    def _compare(self, low: int, high: int, stats: Stats) -> None:
        count = high - low
        size = count * self.itemsize
        merged = scratch.get("merged", size, torch.uint8).numpy()
        self._read_merged(low, high, merged)
        stats.elements += count
        if self.job.is_verbatim:
            expected = scratch.get("expected", size, torch.uint8).numpy()
            self.read_into(low, high, expected)
            if np.array_equal(expected, merged):
                stats.equal += count
                stats.bins[0] += count
                return
            if not self.source.is_float:
                unlike = int(
                    (expected.reshape(count, -1) != merged.reshape(count, -1)).any(1).sum()
                )
                stats.equal += count - unlike
                stats.outside += unlike
                stats.unlike_base += unlike
                return
        self.prepare()
        x = self.load(low, high)
        before = scratch.get("before", count, self.work).copy_(x)
        self.add(x, low, high)
        expected_out = scratch.get("expected", size, torch.uint8).view(TORCH[self.job.dtype])
        narrowed(x, expected_out)
        expected = expected_out.view(torch.uint8).numpy()
        positions, distances = find(merged, expected, self.itemsize)
        stats.equal += count - positions.size
        stats.bins[0] += count - positions.size
        got = scratch.get("got", count, self.work)
        got.copy_(torch.from_numpy(merged).view(TORCH[self.job.dtype]))
        self._sum(before, x, got, expected_out if positions.size else None, stats)
        if positions.size:
            self._judge(low, positions, distances, before, x, got, expected_out, stats)

    def _sum(
        self,
        before: torch.Tensor,
        x: torch.Tensor,
        got: torch.Tensor,
        expected: torch.Tensor | None,
        stats: Stats,
    ) -> None:
        """Add the block's sums; `expected` is None where it equals `got`."""
        difference = scratch.get("difference", len(x), self.work)
        torch.sub(got, x, out=difference)
        lost = float(torch.dot(difference, difference))
        stats.lost += lost
        if not self.job.is_arithmetic:
            return
        delta = scratch.get("product", len(x), self.work)
        torch.sub(x, before, out=delta)
        stats.delta += float(torch.dot(delta, delta))
        torch.sub(got, before, out=difference)
        stats.change += float(torch.dot(difference, difference))
        along = float(torch.dot(difference, delta))
        stats.along += along
        if expected is None:
            stats.expected_along += along
            stats.expected_lost += lost
        else:
            difference.copy_(expected)
            difference -= before
            stats.expected_along += float(torch.dot(difference, delta))
            difference -= delta
            stats.expected_lost += float(torch.dot(difference, difference))

    def _judge(
        self,
        low: int,
        positions: npt.NDArray[np.int64],
        distances: npt.NDArray[np.signedinteger],
        before: torch.Tensor,
        x: torch.Tensor,
        got: torch.Tensor,
        expected: torch.Tensor,
        stats: Stats,
    ) -> None:
        """Sort the elements that are not as expected by what may explain them."""
        steps = np.abs(distances.astype(np.int64))
        stats.largest_ulp = max(stats.largest_ulp, int(steps.max()))
        bins = np.searchsorted(BINS, steps)
        for index, number in zip(*np.unique(bins, return_counts=True), strict=True):
            stats.bins[int(index)] += int(number)
        w, t, m, e = (
            v.double().numpy()[positions] for v in (before, x, got, expected.to(self.work))
        )
        with np.errstate(all="ignore"):  # a damaged file may hold anything
            deviation = np.abs(m - t)
            apart = np.abs(m - e)
            finite = apart[np.isfinite(apart)]
            stats.largest = max(stats.largest, float(finite.max()) if finite.size else 0.0)
            reach = self._reach(low + positions)
            unit = torch.finfo(self.work).eps / 2
            noise = _NOISE * unit * (np.abs(w) + np.abs(t) + reach)
            once = deviation <= ulp(t, self.job.dtype) / 2 + noise
            wide = noise + ulp(t, self.job.dtype) / 2
            if self.halves and self.job.is_arithmetic:
                wide = wide + np.max([_slack(w, t, reach, half) for half in self.halves], axis=0)
            inside = deviation <= wide
            cast = before.to(TORCH[self.job.dtype]).to(self.work).double().numpy()
            unlike = got.double().numpy() != cast
            self._name(w, t, m, stats)
        stats.unlike_base += int(unlike.sum())
        stats.noise += int(once.sum())
        stats.rounding += int((inside & ~once).sum())
        outside = ~(inside | once)
        stats.outside += int(outside.sum())
        if outside.any():
            with np.errstate(all="ignore"):
                stats.outside_along += float(((m - w) * (t - w))[outside].sum())
                stats.outside_expected += float(((e - w) * (t - w))[outside].sum())

    def _reach(self, positions: npt.NDArray[np.int64]) -> Values:
        """Upper bounds of Σ|scale·b·a| at these elements: ‖b‖·‖a‖ of their rows and columns."""
        rows, columns = np.divmod(positions, self.columns)
        total = np.zeros(len(positions))
        for (b, a), term in zip(self._norms, self._terms, strict=True):
            out, width = (columns, rows) if term.transposed else (rows, columns)
            reach = b[out] * a[width]
            if term.gains is not None:
                reach *= np.maximum(1, np.abs(term.gains.double().numpy()[out]))
            total += reach
        return total

    @cached_property
    def _norms(self) -> list[tuple[Values, Values]]:
        """For each delta ‖scale·b‖ of the rows of B, and ‖a‖ of the columns of A."""
        return [
            (
                torch.linalg.norm(term.b.double(), dim=1).numpy() * abs(term.scale),
                torch.linalg.norm(term.a.double(), dim=0).numpy(),
            )
            for term in self._terms
        ]

    def _name(self, w: Values, t: Values, m: Values, stats: Stats) -> None:
        """Count how many of the differing elements the known ways of rounding twice explain."""
        out = self.job.dtype
        delta = t - w
        for half in self.halves:
            if self.job.is_arithmetic:
                stats.ways[f"delta-{half}"] += _count_equal(m, w + rounded(delta, half), out)
            if half != out:
                stats.ways[f"through-{half}"] += _count_equal(m, rounded(t, half), out)
        if self.job.is_arithmetic and out in self.halves and self.source.dtype != out:
            cast = rounded(w, out)
            stats.ways[f"cast-{out}"] += _count_equal(m, cast + delta, out)
            stats.ways[f"both-{out}"] += _count_equal(m, cast + rounded(delta, out), out)


def _count_equal(found: Values, value: Values, dtype: str) -> int:
    return int(np.count_nonzero(found == rounded(value, dtype)))


def rounded(values: Values, dtype: str) -> Values:
    """float64 values rounded to a dtype and widened again, by way of float32."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).float()
    wide: Values = tensor.to(TORCH[dtype]).double().numpy()
    return wide


def ulp(values: Values, dtype: str) -> Values:
    """The distance of neighbouring numbers of `dtype` at these values."""
    fraction, smallest = _FORMATS[dtype]
    exponent = np.frexp(np.where(np.isfinite(values), values, 0))[1] - 1
    unit: Values = np.ldexp(1.0, np.maximum(exponent, smallest) - fraction)
    return unit


def _slack(w: Values, t: Values, reach: Values, half: str) -> Values:
    """How far rounding W, Δ, their sum, and the factors of the product to `half` may lead."""
    steps = (ulp(w, half) + ulp(t, half) + ulp(t - w, half)) / 2
    wide: Values = steps + reach * math.ldexp(1.0, -_FORMATS[half][0])
    return wide
