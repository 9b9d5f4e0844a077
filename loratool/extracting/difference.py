"""tuned - base of one tensor, as a float32 matrix that is read in blocks of rows.

Where one side is float64, so is the subtraction.

A matrix that is small enough is held in memory once it has been read; the others are read again for
every pass, from files that the system has just cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from loratool.dtypes import FLOAT_FORMATS
from loratool.errors import ValueRangeError
from loratool.extracting.quantising import Ends, QuantisingTest
from loratool.extracting.rounding import RoundingTest
from loratool.merging.rounding import TORCH
from loratool.models.quantised.ends import ends_of
from loratool.storage.tensors import BLOCK_ELEMENTS, FilePool, TensorInfo
from loratool.storage.values import values_of
from loratool.streams.scratch import scratch

#: Elements of a difference that is held: 256 MB of float32, or 4 GB on a GPU.
_HELD = {"cpu": 1 << 26, "cuda": 1 << 30}

#: A ‖Δ‖² above this leaves the range of float32 when Δ is multiplied with itself.
_LARGEST = 1e30

#: Elements that a GPU is given at a time.
_GPU_BLOCK = 1 << 24


@dataclass(frozen=True)
class Size:
    """`energy` is ‖tuned - base‖² and `weight` ‖base‖²; `changed` is False where all are equal.

    `noise` estimates ‖·‖² of what storing the tuned values in their dtype rounded off, of those
    that differ, and of what quantising did; `quantising` is that part of it. With `rounding` the
    whole difference is of that kind, and `noise` is all of it.
    """

    energy: float
    weight: float
    changed: bool
    noise: float
    rounding: bool = False
    quantising: float = 0.0

    def bounded(self, cut: float) -> Size:
        """The same, now that factors of a low rank leave no more than `cut` of ‖Δ‖².

        What was rounded off has full rank, so half of it at least would be left.
        """
        if cut >= self.quantising / 4:
            return self
        of_codes = min(self.quantising, 2 * cut)
        return replace(self, noise=self.noise - self.quantising + of_codes, quantising=of_codes)


class Stopped(Exception):
    """Nobody waits for this matrix any more."""


class Difference:
    """`tuned - base` as a matrix `[rows, columns]`: the first dimension, and all the others.

    Once `stop` is set, the next block raises Stopped: a large matrix takes long, and after Ctrl-C
    its thread is waited for.
    """

    def __init__(
        self,
        base: TensorInfo,
        tuned: TensorInfo,
        files: FilePool,
        device: torch.device,
        stop: threading.Event | None = None,
    ) -> None:
        self.base = base
        self.tuned = tuned
        self.device = device
        self.rows = base.shape[0] if base.shape else 1
        self.columns = base.numel // self.rows if self.rows else 0
        self.elements = self.rows * self.columns
        self._values = {info: values_of(info, files) for info in (base, tuned)}
        self._ends = [
            None if pair is None else [values_of(end, files) for end in pair]
            for pair in (ends_of(base), ends_of(tuned))
        ]
        self._stop = stop or threading.Event()
        self.held: torch.Tensor | None = None
        double = "F64" in (base.dtype, tuned.dtype)
        self._work = torch.float64 if double else torch.float32
        block = BLOCK_ELEMENTS if device.type == "cpu" else _GPU_BLOCK
        self._block_rows = max(1, block // max(1, self.columns))

    def measure(self, hold: bool = False) -> Size:
        """Read it once; with `hold` it stays in memory if it is small enough.

        Raises ValueRangeError for NaN or infinity on either side.
        """
        held = None
        if hold and self.rows * self.columns <= _HELD[self.device.type]:
            held = self._buffer()
        energy = weight = moved = 0.0
        test = RoundingTest(self.base.dtype, self.tuned.dtype)
        quantising = QuantisingTest(self.base, self.tuned) if any(self._ends) else None
        for low, high in self._ranges():
            before, after = self._both(low, high)
            test.take(before, after)
            if quantising is not None:
                quantising.take(before, after, partial(self._read_ends, low), test.is_exact)
            block = after.sub_(before).float()
            weight += _squared(before)
            energy += _squared(block)
            moved += _squared(before.mul_(block.sign()))  # masks of bools take three times as long
            if held is not None:
                held[low:high] = block
        if not energy < _LARGEST:
            self._explain()
        self.held = held
        noise, of_codes = moved * _rounded_off(self.tuned.dtype), 0.0
        rounding = energy > 0 and test.passed
        if quantising is not None:
            of_codes = min(quantising.noise, energy)
            noise += of_codes
            if energy > 0 and not rounding and quantising.passed:
                rounding, of_codes = True, energy
        noise = energy if rounding else min(noise, energy)
        return Size(energy, weight, energy > 0, noise, rounding, of_codes)

    def _buffer(self) -> torch.Tensor:
        """Room for the whole matrix. On the CPU each thread has one, and uses it again."""
        if self.device.type != "cpu":
            return torch.empty(self.rows, self.columns, device=self.device)
        count = self.rows * self.columns
        return scratch.get("difference", count, torch.float32).view(self.rows, self.columns)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each block, and the block `[n, columns]`, in float32."""
        for low, high in self._ranges():
            if self.held is not None:
                yield low, self.held[low:high]
            else:
                before, after = self._both(low, high)
                yield low, after.sub_(before).float()

    def _both(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the base and of the tuned model."""
        return self._read(self.base, low, high), self._read(self.tuned, low, high)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for low in range(0, self.rows if self.columns else 0, self._block_rows):
            if self._stop.is_set():
                raise Stopped
            yield low, min(low + self._block_rows, self.rows)

    def _read(self, info: TensorInfo, low: int, high: int) -> torch.Tensor:
        """Rows `[low, high)` of one side widened, to be used before the next are read."""
        values = self._values[info]
        raw = scratch.get("raw", (high - low) * self.columns * info.itemsize, torch.uint8)
        values.read_into(low * self.columns, high * self.columns, raw.numpy())
        stored = raw.view(TORCH[info.dtype]).view(high - low, self.columns)
        if self.device.type != "cpu":
            return stored.to(self.device).to(self._work)
        side = "values" if info is self.tuned else "before"
        widened = scratch.get(side, stored.numel(), self._work).view(stored.shape)
        return widened.copy_(stored)

    def _read_ends(self, base: int, low: int, high: int) -> tuple[Ends | None, Ends | None]:
        """What both sides stand for in rows `[low, high)` from row `base` on."""
        found: list[Ends | None] = [None, None]
        for side, ends in enumerate(self._ends):
            if ends is not None:
                start, stop = ((base + row) * self.columns for row in (low, high))
                lower, upper = (
                    torch.from_numpy(values.bytes(start, stop)).view(torch.float32)
                    .view(high - low, self.columns).to(self.device, self._work)
                    for values in ends
                )  # fmt: skip
                found[side] = lower, upper
        return found[0], found[1]

    def _explain(self) -> None:
        """Raise ValueRangeError that names the side with NaN or infinity, or the overflow."""
        for role, info in (("base", self.base), ("tuned model", self.tuned)):
            count = sum(
                int((~torch.isfinite(self._read(info, low, high))).sum())
                for low, high in self._ranges()
            )
            if count:
                raise ValueRangeError(
                    f"{info.name}: {count} of {info.numel} values of the {role} are NaN or "
                    f"infinite in float32 ({info.file}).",
                    "The file is damaged, or training diverged. Nothing was written.",
                )
        raise ValueRangeError(
            f"{self.tuned.name}: the difference is too large to be squared in float32.",
            "Are these two models of the same kind? Nothing was written.",
        )


def _squared(block: torch.Tensor) -> float:
    """Σx² in float64: float32 would round equal squares alike, and all sums one way."""
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _rounded_off(dtype: str) -> float:
    """The mean square of what rounding to a dtype takes, as a share of the mean square of values.

    Rounding is off by ulp²/12 on average, and the ulp of values in [2ᵉ, 2ᵉ⁺¹) is 2ᵉ⁻ᵐ with m bits
    of mantissa. The mean of 4ᵉ is 0.54 of that of x² for normally distributed values, and 3/7 for
    evenly distributed ones.
    """
    return 0.5 * 4.0 ** -FLOAT_FORMATS[dtype].fraction / 12
