"""What PiSSA and OLoRA take off a weight, derived from the weight as PEFT does it.

PiSSA takes the best approximation of rank r, `U_r·Σ_r·V_rᵀ`; OLoRA takes `scale·Q_r·R_r` of W = QR,
as W is stored. Both come out the same whatever the signs of singular vectors and of QR are. PEFT
computes in float32, and so up to its rounding; here the decompositions are made in float64.
Source: peft/tuners/lora/layer.py (`pissa_init`, `olora_init`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from loratool.adapters.factors import LowRank, Matrix
from loratool.errors import ValueRangeError
from loratool.linalg.truncation import truncated
from loratool.merging.initial import Derivation
from loratool.merging.match import Delta
from loratool.merging.plan import Taken
from loratool.storage.values import Values
from loratool.streams.workers import Workers
from loratool.words import counted

#: What lies nearer together than this share of the largest singular value, no float32
#: decomposition tells apart.
_RESOLVED = 4 * 2.0**-23
#: What a decomposition in float32 is off by, as a share of the largest value, about.
_NOISE = 8 * 2.0**-24


@dataclass(frozen=True)
class Computed(LowRank):
    """Factors that were computed, with the shapes of those of the adapter: Δ = left·right.

    `doubt` is how far float32 may lead astray who computes them with it, as a share of Δ.
    """

    left: Matrix | None = None
    right: Matrix | None = None
    doubt: float = 0.0

    def left_right(self, files: object = None) -> tuple[Matrix, Matrix]:
        assert self.left is not None
        assert self.right is not None
        return self.left, self.right


def computed_delta(delta: Delta, left: Matrix, right: Matrix, doubt: float = 0.0) -> Delta:
    """`left [out, k] · right [k, in]` in the place of a delta, all of it, with the scale 1."""
    parts = delta.factors.parts
    factors = Computed(
        delta.factors.path, "linear", parts["A"], parts["B"], None, 1.0,
        left=np.ascontiguousarray(left, np.float32), right=np.ascontiguousarray(right, np.float32),
        doubt=doubt,
    )  # fmt: skip
    return Delta(delta.place, factors)


def scale_folded(delta: Delta) -> Delta:
    """A delta of B and A as two matrices in memory, the scale in the left one."""
    if isinstance(delta.factors, Computed):
        return delta
    pair = delta.factors.left_right()
    assert pair is not None
    left = pair[0] if delta.rows is None else pair[0][np.asarray(delta.rows)]
    return computed_delta(delta, left * np.float32(delta.scale), pair[1])


def derived(taken: Taken, values: Values) -> Delta:
    """The delta that was taken, in numbers; `values` are those of the untouched tensor.

    Reads the whole tensor. Raises ValueRangeError where it does not determine what was taken.
    """
    if taken.how == "given":
        return taken.delta
    place, factors = taken.delta.place, taken.delta.factors
    whole = values.floats(0, values.length).reshape(values.info.shape)
    weight = np.ascontiguousarray(place.part(whole))
    broken = int(np.count_nonzero(~np.isfinite(weight)))
    if broken:
        raise ValueRangeError(
            f"{place.tensor} ({values.info.file}): {counted(broken, 'value', 'is')} NaN or "
            "infinite before anything is added.",
            "The file is damaged, or training diverged. Nothing was written.",
        )
    if not weight.any():
        return computed_delta(taken.delta, weight[:, :0], weight[:0])
    if taken.how == "pissa":
        return computed_delta(taken.delta, *_principal(weight, factors.rank, place.tensor))
    assert factors.scale is not None
    if place.transposed:  # PEFT decomposes what is stored
        left, right, doubt = _triangular(weight.T, factors.rank, place.tensor)
        return computed_delta(taken.delta, right.T, left.T * np.float32(factors.scale), doubt)
    left, right, doubt = _triangular(weight, factors.rank, place.tensor)
    return computed_delta(taken.delta, left * np.float32(factors.scale), right, doubt)


def seconds_for(cost: Derivation, threads: int) -> float:
    """About how long decompositions take here, by one of a matrix of 512 rows; one per thread."""
    size = 512
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(size, size, generator=generator).numpy()
    with Workers(1) as workers:
        started = time.perf_counter()
        list(workers.in_order([partial(_principal, sample, 16, "a sample")]))
        elapsed = time.perf_counter() - started
    return elapsed * cost.flops / (11.0 * size**3) / max(1, min(threads, cost.matrices))


class _Held:
    """A matrix in memory, as `linalg.truncation` reads one."""

    def __init__(self, weight: Matrix) -> None:
        self._whole = torch.from_numpy(weight)
        self.held: torch.Tensor | None = self._whole
        self.rows, self.columns = weight.shape
        self.device = self._whole.device

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        size = max(1, (1 << 20) // max(1, self.columns))
        for low in range(0, self.rows, size):
            yield low, self._whole[low : low + size]


def _principal(weight: Matrix, rank: int, name: str) -> tuple[Matrix, Matrix, float]:
    """`(U·√Σ [out, r], √Σ·Vᵀ [r, in], doubt)` of the largest r singular values."""
    found = truncated(_Held(weight), 0.0, lambda values, _: min(rank, len(values)), exact=True)
    doubt = _NOISE
    if len(found.values) == rank and len(found.following):
        largest, last, following = map(
            float, (found.values[0], found.values[-1], found.following[0])
        )
        if last > following:
            doubt = _NOISE * largest / (last - following)
        if last - following < _RESOLVED * largest and last > _RESOLVED * largest:
            raise _undetermined(
                name,
                f"singular values {rank} and {rank + 1} are as good as equal ({last:.7g} and "
                f"{following:.7g}), so which direction PiSSA took is chance",
            )
    return found.left.numpy(), found.right.numpy().T, doubt


def _triangular(weight: Matrix, rank: int, name: str) -> tuple[Matrix, Matrix, float]:
    """`(Q [rows, r], R [r, columns], doubt)`, the first r columns and rows of the factors of QR.

    Q's first r columns depend on those of the weight alone, and R = Qᵀ·W.
    """
    whole = torch.from_numpy(np.ascontiguousarray(weight))
    q, r = torch.linalg.qr(whole[:, :rank].double())
    least, length = float(r.diagonal().abs().min()), float(torch.linalg.vector_norm(r))
    if least <= _RESOLVED * length:
        raise _undetermined(
            name, f"its first {rank} columns depend on each other, so what OLoRA took is chance"
        )
    right = torch.cat([q.T @ part.double() for part in torch.split(whole, _COLUMNS, dim=1)], dim=1)
    return q.float().numpy(), right.float().numpy(), _NOISE * length / least


#: Columns that are widened to float64 at a time.
_COLUMNS = 1024


def _undetermined(name: str, why: str) -> ValueRangeError:
    return ValueRangeError(
        f"{name}: {why}.", "Give the adapter as it was before training: --initial ADAPTER."
    )
