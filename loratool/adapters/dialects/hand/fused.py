"""loralib's pairs of several factors: for parts of a fused weight, and for convolutions.

Formulas: loralib/layers.py of 0.1.2, `MergedLinear.merge_AB` and `ConvLoRA.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapters.dialects.dialect import Evidence
from loratool.adapters.dialects.hand.names import (
    HandPair,
    is_hand_written,
    may_be_factor,
    sorted_names,
)
from loratool.storage.composed import joined
from loratool.storage.computed import computed_tensor
from loratool.storage.tensors import TensorInfo

Array = npt.NDArray[np.floating[Any]]


def parts_with_factors(pair: HandPair) -> int:
    """For how many equal parts of a weight a pair has factors: A is `[r·n, in]`, and B has a block
    `[rows, r]` for each; 1 for a plain pair, 0 for what is neither."""
    a, b = pair.a.shape, pair.b.shape
    if pair.layers or pair.words["A"] != "lora_A" or len(a) != 2 or len(b) != 2:
        return 0
    if 0 in (*a, *b) or a[0] % b[1] or b[0] % (a[0] // b[1]):
        return 0
    return a[0] // b[1]


def is_merged(pair: HandPair) -> bool:
    """Whether a pair can only be of several parts."""
    return parts_with_factors(pair) > 1 and pair.b.shape[1] < pair.a.shape[1]


def of_parts(pair: HandPair, enabled: Sequence[bool]) -> tuple[TensorInfo, TensorInfo]:
    """`A [r·n, in]` and `B [out, r·n]` of a weight of as many equal parts as `enabled` has flags, n
    of which have factors: those of part j are rows of A and a block of B, on the diagonal."""
    count, rank = sum(enabled), pair.b.shape[1]
    rows = pair.b.shape[0] // count
    numbers = [part for part, has in enumerate(enabled) if has]
    shape = rows * len(enabled), rank * count

    def spread(b: Array) -> Array:
        wide = np.zeros(shape, b.dtype)
        for own, part in enumerate(numbers):
            block = b[own * rows : (own + 1) * rows]
            wide[part * rows : (part + 1) * rows, own * rank : (own + 1) * rank] = block
        return wide

    flags = ",".join(str(int(has)) for has in enabled)
    name = f"{pair.b.name} in parts {flags}"
    return pair.a, computed_tensor(name, shape, [pair.b], spread, pair.b.dtype)


def of_convolution(pair: HandPair, kernel: int) -> tuple[TensorInfo, TensorInfo]:
    """The factors of a convolution with a square kernel: `A [r·k, in·k]`, `B [out·k, r·k]`.

    loralib gives (B·A) the shape `[out, in, k, k]`: k rows of B·A are one channel, so
    Δ = B′·(I_k ⊗ A) with the rows of B by channel, `B′ [out, k·r·k]`.
    """
    (wide, columns), (rows, _) = pair.a.shape, pair.b.shape
    rank = kernel * wide

    def repeated(a: Array) -> Array:
        return np.asarray(np.kron(np.eye(kernel), a), a.dtype)

    name = f"I_{kernel} ⊗ {pair.a.name}"
    shape = rank, columns // kernel, kernel, kernel
    a = computed_tensor(name, shape, [pair.a], repeated, pair.a.dtype)
    return a, joined(pair.b.name, (rows // kernel, rank, 1, 1), [pair.b])


def kernel_of(pair: HandPair, weight: Sequence[int] | None, rank: int | None) -> int | None:
    """The size of the kernel of loralib's convolution, by the weight `[out, in, k, k]` or the rank;
    None where the pair is of none."""
    a, b = pair.a.shape, pair.b.shape
    if parts_with_factors(pair) != 1:
        return None
    if weight is not None:
        square = len(weight) == 4 and weight[2] == weight[3]
        kernel = weight[2] if square else 0
        fits = bool(kernel) and (b[0], a[1]) == (weight[0] * kernel, weight[1] * kernel)
        return kernel if fits and a[0] % kernel == 0 and kernel > 1 else None
    kernel = a[0] // rank if rank and a[0] % rank == 0 else 1
    return kernel if kernel > 1 and a[1] % kernel == 0 and b[0] % kernel == 0 else None


@lru_cache(maxsize=1)  # two dialects ask
def is_of_loralib(evidence: Evidence) -> bool:
    """Whether a file holds a MergedLinear, which nobody else has."""
    if not is_hand_written(evidence):
        return False
    factors = {k: v for k, v in evidence.tensors.items() if may_be_factor(k)}
    pairs = sorted_names(factors).pairs.values()
    return any(pair.is_whole and is_merged(pair) for pair in pairs)
