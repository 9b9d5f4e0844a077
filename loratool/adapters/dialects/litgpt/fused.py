"""Factors of q, k and v as litgpt keeps them, in one pair, and as the Hub's weights have them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from loratool.models.heads import Heads
from loratool.storage.composed import row_range
from loratool.storage.computed import Array, computed_tensor
from loratool.storage.tensors import TensorInfo


def qkv_parts(
    a: TensorInfo, b: TensorInfo, enabled: tuple[bool, ...], heads: Heads
) -> Iterator[tuple[int, TensorInfo, TensorInfo]]:
    """`(number, A [r, in], B [rows, r])` of each of q, k and v that has factors, as views of
    `A [r·n, in]` and `B [all their rows, r]`."""
    rank = b.shape[1]
    first = 0
    for at, number in enumerate(i for i, is_on in enumerate(enabled) if is_on):
        rows = heads.rows[number]
        own = row_range(a, range(at * rank, (at + 1) * rank))
        yield number, own, row_range(b, range(first, first + rows))
        first += rows


def fused_b(b: TensorInfo, enabled: tuple[bool, ...], heads: Heads, grouped: bool) -> TensorInfo:
    """`B [rows of q, k and v, r·n]` of the fused weight, with which A is as it is stored.

    It has the part of each in its rows and columns, and zeros elsewhere. With `grouped` the rows
    are in the order of weights that have q, k and v of each group of heads together.
    """
    rank, count = b.shape[1], sum(enabled)
    ends = [0, *accumulate(heads.rows)]
    order = group_order(heads) if grouped else None

    def formula(values: Array) -> Array:
        whole = np.zeros((ends[-1], rank * count), values.dtype)
        first = 0
        for at, number in enumerate(i for i, is_on in enumerate(enabled) if is_on):
            rows = values[first : first + heads.rows[number]]
            whole[ends[number] : ends[number + 1], at * rank : (at + 1) * rank] = rows
            first += heads.rows[number]
        return whole if order is None else whole[order]

    what = f"{b.name} (fused for {heads}, {enabled}, {'grouped' if grouped else 'joined'})"
    return computed_tensor(what, (ends[-1], rank * count), [b], formula, b.dtype)


def group_order(heads: Heads) -> npt.NDArray[np.intp]:
    """The row of [q; k; v] that each row of the grouped weight is."""
    q, k, _ = heads.rows
    numbers = np.arange(sum(heads.rows)).reshape(-1, heads.size)
    groups = (numbers[: heads.query], numbers[q // heads.size :][: heads.kv],
              numbers[(q + k) // heads.size :])  # fmt: skip
    return np.concatenate([part.reshape(heads.kv, -1) for part in groups], axis=1).reshape(-1)
