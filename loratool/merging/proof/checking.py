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
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loratool.dtypes import FLOAT_FORMATS
from loratool.merging.arithmetic import RunningJob
from loratool.merging.derivation import Computed
from loratool.merging.plan import Job
from loratool.merging.proof.findings import BINS, Stats
from loratool.merging.proof.rounding_paths import RoundingPaths
from loratool.merging.rounding import TORCH, magnitudes_of, narrowed, ulp
from loratool.merging.undo.residual import ordered
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, blocks
from loratool.storage.values import values_of
from loratool.streams.run import Run
from loratool.streams.scratch import scratch
from loratool.streams.workers import Workers

Values = npt.NDArray[np.floating[Any]]

#: Elements that are judged together.
_PIECE = 1 << 17

#: How often the order of a sum may move its result by half a unit of the working dtype.
_NOISE = 16.0


#: The unit in the last place of float32, of a number near 1.
_EPS = 2.0**-23


@dataclass(frozen=True)
class Pair:
    """A merged tensor and the job that should give it; the job's dtype is the tensor's."""

    job: Job
    merged: TensorInfo


def measure(pairs: Sequence[Pair], run: Run) -> dict[str, Stats]:
    """The statistics of every pair, by the job's name."""
    found: dict[str, Stats] = {}
    advance = run.counted(sum(pair.merged.nbytes for pair in pairs))
    with FilePool() as files, Workers(run.threads) as workers:
        for name, nbytes, stats in workers.in_order(_calls(pairs, files, workers)):
            found.setdefault(name, Stats()).__iadd__(stats)
            advance(nbytes, name)
    for pair in pairs:
        found.setdefault(pair.job.name, Stats())  # tensors without elements
    return found


def _calls(
    pairs: Sequence[Pair], files: FilePool, workers: Workers
) -> Iterator[Callable[[], tuple[str, int, Stats]]]:
    parts = (_Comparing(pair, files) for pair in pairs)
    for running in workers.ahead(parts, _Comparing.long_before):
        for low, high in blocks(running.length, running.task_elements):
            yield partial(running.task, low, high)


@dataclass(frozen=True)
class Shares:
    """The least-squares coefficient of (M - W) on each delta, and Σ of squares that they leave."""

    weights: list[float]
    rest: float


def attribute(pairs: Sequence[Pair], run: Run) -> dict[str, Shares]:
    """How much of each of its deltas every merged tensor holds; plain deltas only."""
    sums: dict[str, Values] = {}
    with FilePool() as files, Workers(run.threads) as workers:
        calls = (
            partial(running.correlations, low, high)
            for running in (_Comparing(pair, files) for pair in pairs)
            for low, high in blocks(running.length, running.block_elements)
        )
        for name, products in workers.in_order(calls):
            sums[name] = sums.get(name, 0) + products
    found = {}
    for name, products in sums.items():
        gram, along, total = products[:-1, :-1], products[:-1, -1], products[-1, -1]
        weights = np.linalg.lstsq(gram, along, rcond=None)[0]
        found[name] = Shares(weights.tolist(), float(total - weights @ along))
    return found


class _Comparing(RunningJob):
    """A job whose blocks are compared instead of written."""

    def __init__(self, pair: Pair, files: FilePool) -> None:
        super().__init__(pair.job, files)
        self.merged = values_of(pair.merged, files)
        #: The half-precision dtypes in play, that another tool may have rounded to on the way.
        seen = {d.factors.dtype for d in pair.job.deltas} | {pair.job.dtype, self.source.dtype}
        self.halves = sorted(seen & {"F16", "BF16"})
        self._ways = RoundingPaths(self)
        before = pair.job.before
        self._before = None if before is None else values_of(before, files)

    def task(self, low: int, high: int) -> tuple[str, int, Stats]:
        stats = Stats()
        for first, last in blocks(high - low, self.block_elements):
            self._compare(low + first, low + last, stats)
        return self.job.name, (high - low) * self.itemsize, stats

    def correlations(self, low: int, high: int) -> tuple[str, Values]:
        """The scalar products of all deltas and M - W in a block, `[deltas + 1, deltas + 1]`."""
        self.prepare()
        merged = self.merged.bytes(low, high)
        change = torch.from_numpy(merged).view(TORCH[self.job.dtype]).to(self.work)
        change -= self.load(low, high)
        first, last = low // self.columns, high // self.columns
        rows = torch.zeros(len(self.terms) + 1, high - low, dtype=self.work)
        for row, term in zip(rows, self.terms, strict=False):
            term.add_to(row.view(-1, self.columns), first, last)
        rows[-1] = change
        return self.job.name, (rows @ rows.T).double().numpy()

    def _compare(self, low: int, high: int, stats: Stats) -> None:
        count = high - low
        size = count * self.itemsize
        merged = scratch.get("merged", size, torch.uint8).numpy()
        self.merged.read_into(low, high, merged)
        stats.elements += count
        if self.job.is_verbatim and self._before is None:
            expected = scratch.get("expected", size, torch.uint8).numpy()
            self.values.read_into(low, high, expected)
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
        before = scratch.get("before", count, self.work)
        if self._before is None:
            before.copy_(x)
        else:
            before.copy_(torch.from_numpy(self._before.floats(low, high)))
        self.add(x, low, high)
        expected_out = scratch.get("expected", size, torch.uint8).view(TORCH[self.job.dtype])
        narrowed(x, expected_out)
        expected = expected_out.view(torch.uint8).numpy()
        kind = f"i{self.itemsize}"
        different = merged.view(kind) != expected.view(kind)
        got = scratch.get("got", count, self.work)
        got.copy_(torch.from_numpy(merged).view(TORCH[self.job.dtype]))
        if magnitudes_of(merged, self.job.dtype)[1]:
            # Infinity where the base has none is not what anybody wanted, even if it is expected.
            different |= (~torch.isfinite(got) & torch.isfinite(before)).numpy()
        unlike = int(np.count_nonzero(different))
        stats.equal += count - unlike
        stats.bins[0] += count - unlike
        along = self._sum(before, x, got, expected_out if unlike else None, stats)
        if unlike:
            _count_steps(merged, expected, self.itemsize, stats)
            # In pieces, so that what judging them takes stays small and in the cache.
            for first, last in blocks(count, max(1, _PIECE // self.columns) * self.columns):
                if different[first:last].any() or not self.job.is_change:
                    piece = slice(first, last)
                    values = before[piece], x[piece], got[piece], expected_out[piece]
                    self._judge(low + first, *values, stats)
            apart = scratch.get("difference", count, self.work).copy_(expected_out).sub_(got)
            stats.inside_apart += float(torch.dot(apart, apart))
            along = float(torch.dot(got.sub_(before), x.sub_(before)))
        stats.inside_along += along

    def _sum(
        self,
        before: torch.Tensor,
        x: torch.Tensor,
        got: torch.Tensor,
        expected: torch.Tensor | None,
        stats: Stats,
    ) -> float:
        """Add the block's sums; `expected` is None where it equals `got`. Returns Σ (M - W)·Δ."""
        difference = scratch.get("difference", len(x), self.work)
        torch.sub(got, x, out=difference)
        lost = float(torch.dot(difference, difference))
        stats.lost += lost
        if not self.job.is_change:
            return 0.0
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
        return along

    def _judge(
        self,
        low: int,
        w: torch.Tensor,
        x: torch.Tensor,
        got: torch.Tensor,
        stored: torch.Tensor,
        stats: Stats,
    ) -> None:
        """Sort elements from `low` on by what may explain that they are not as expected.

        `stored` are the expected values in the output's dtype. Where a few are outside of all
        tolerances, `got` is changed to `x` there: they may outweigh all others in the sums, and
        those are judged without them.
        """
        self._ways.count(w, x, got, low, stats)
        expected = stored.to(self.work)
        reach = self._reach(low, low + len(w), w)
        apart = (got - expected).abs_()
        if not math.isfinite(largest := float(apart.max())):
            apart.nan_to_num_(nan=0.0, posinf=0.0)  # a damaged file may hold anything
            largest = float(apart.max())
        stats.largest = max(stats.largest, largest)
        deviation = (got - x).abs_()
        delta = x - w
        noise = (w.abs() + x.abs()).add_(reach).mul_(_NOISE * torch.finfo(self.work).eps / 2)
        if self.taken:
            noise += self._doubt(low, w)
        noise.add_(ulp(x, self.job.dtype), alpha=0.5)
        same = got == expected
        once = deviation <= noise
        inside = once.clone()
        for half in self.halves if self.job.is_change else ():
            slack = (ulp(w, half) + ulp(x, half)).add_(ulp(delta, half)).div_(2)
            slack.add_(reach, alpha=math.ldexp(1.0, -FLOAT_FORMATS[half].fraction))
            inside |= deviation <= slack.add_(noise)
        # Graphics cards multiply float32 with the fraction of a float16 if they are let (TF32).
        inside |= deviation <= noise.add_(reach, alpha=math.ldexp(1.0, -10))
        outside = ~(inside | same) | (~torch.isfinite(got) & torch.isfinite(w))
        cast = w.to(stored.dtype).to(self.work)
        moved = cast != expected
        stats.unlike_base += int((cast != got).sum())
        stats.to_move += int(moved.sum())
        stats.unmoved += int((moved & (cast == got)).sum())
        stats.rounding += int((inside & ~once & ~same).sum())
        beyond = int(outside.sum())
        stats.outside += beyond
        if 0 < beyond * 8 <= len(w):
            torch.where(outside, x, got, out=got)

    def _reach(self, low: int, high: int, w: torch.Tensor) -> torch.Tensor:
        """Upper bounds of Σ|scale·b·a| by ‖b‖·‖a‖, for elements `[low, high)`, which are `w` in the
        base. What a function sums up it makes of a row: its norm bounds that, about."""
        total = torch.zeros(high - low, dtype=self.work)
        if self.job.before is not None:
            rows = w.view(-1, max(1, math.prod(self.source.shape[1:])))
            total.view(rows.shape).add_(torch.linalg.norm(rows, dim=1, keepdim=True))
        first, last = low // self.columns, high // self.columns
        for terms in (self.terms, self.loaded_taken):
            for _, term, window in terms.meeting(first, last):
                part = window.of(total.view(-1, self.columns))
                part += term.reach(window)
        return total

    def _doubt(self, low: int, w: torch.Tensor) -> torch.Tensor:
        """How far the values that training began with may be others on another machine.

        `w` are those of the base, from element `low` on. What was taken off them has an error of
        its own, and where the difference lies on the edge between two values of the base's dtype,
        it may have gone to either side.
        """
        first, last = low // self.columns, (low + len(w)) // self.columns
        left, doubt = w.clone(), w.abs().mul_(_EPS)
        for number, term, window in self.loaded_taken.meeting(first, last):
            derived = self.taken[number].factors
            share = derived.doubt if isinstance(derived, Computed) else _EPS
            window.of(left.view(-1, self.columns)).sub_(term.product(window))
            window.of(doubt.view(-1, self.columns)).add_(term.reach(window), alpha=share)
        step = ulp(left, self.source.dtype)
        off = (left - left.to(TORCH[self.source.dtype]).to(self.work)).abs_()
        doubt += step * (off + doubt >= step / 2)
        for gain in self.gains:
            if gain is not None:
                doubt *= max(1.0, float(gain.abs().max()))
        return doubt


def _count_steps(merged: Bytes, expected: Bytes, itemsize: int, stats: Stats) -> None:
    """Count the differing elements of a block by their distance in units in the last place."""
    wide = np.int32 if itemsize == 2 else np.int64
    one, other = (ordered(v.view(f"i{itemsize}")).astype(wide) for v in (merged, expected))
    steps = np.abs(one - other)
    stats.largest_ulp = max(stats.largest_ulp, int(steps.max()))
    counts = np.bincount(np.minimum(steps, BINS[-1] + 1), minlength=BINS[-1] + 2)
    edges = [1, *(end + 1 for end in BINS[1:]), BINS[-1] + 2]  # 0 is counted by the caller
    for index, (begin, end) in enumerate(pairwise(edges), 1):
        stats.bins[index] += int(counts[begin:end].sum())
