"""What the drafts of all dialects are made of: factors in one rank, one scale and one dtype.

A factor that is written as it is stays the `TensorInfo` that it was; anything else is one whose
elements are computed when the file is written. So a draft costs headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.writing import Draft, Fate, Outcome
from loratool.adapters.experts import ExpertPair, ExpertStack
from loratool.adapters.factors import Factors, LowRank, block_diagonal
from loratool.dtypes import DTYPE_BITS, FACTOR_DTYPES
from loratool.storage.composed import joined, member, row_range, transposed, view
from loratool.storage.computed import Array, computed_tensor
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Fitted:
    """Factors as they are written: `a [rank, in, …]` and `b [out, rank, …]`, and what became of
    them: a fate's outcome and detail."""

    a: TensorInfo
    b: TensorInfo
    fate: Fate


def known_scale(module: Factors) -> float:
    """The scale of a module, which is known of every adapter that is not refused."""
    assert module.scale is not None
    return module.scale


def alpha_for(scale: float, rank: int) -> float:
    """An alpha with alpha/rank = scale in float64, to the last bit if there is one."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((found for found in near if found / rank == scale), alpha)


def common_dtype(modules: Sequence[Factors], asked: str | None) -> str:
    """The dtype of a file that has one: as asked, or that of all factors; float32 where they differ
    or are of a dtype that no adapter is written in."""
    found = {t.dtype for module in modules for t in module.parts.values()}
    known = found <= set(FACTOR_DTYPES.values())
    return asked or (next(iter(found)) if len(found) == 1 and known else "F32")


def common_rank(modules: Sequence[Factors]) -> int:
    """The rank of a file that has one: the largest."""
    return max((module.rank for module in modules), default=1)


def common_scale(modules: Sequence[Factors]) -> float:
    """The scale of a file that has one: that of most parameters, so that most stay as they are."""
    weights: dict[float, int] = {}
    for module in modules:
        scale = known_scale(module)
        if scale:
            weights[scale] = weights.get(scale, 0) + module.parameters
    return max(weights, key=lambda scale: weights[scale], default=1.0)


def low_rank(module: Factors) -> LowRank | None:
    """The module as a pair of two tensors, whatever it is made of; None where it is none."""
    if isinstance(module, LowRank):
        return _unblocked(module)
    if isinstance(module, ExpertPair):
        return _of_expert(module)
    return None


def _unblocked(module: LowRank) -> LowRank:
    """BD-LoRA's blocks put on their diagonal."""
    out, width = module.shape
    a, b = module.a, module.b
    if module.blocks_a > 1:
        formula = partial(block_diagonal, count=module.blocks_a)
        a = computed_tensor(f"{a.name} (diagonal)", (module.rank, width), [a], formula, a.dtype)
    if module.blocks_b > 1:
        formula = partial(block_diagonal, count=module.blocks_b)
        b = computed_tensor(f"{b.name} (diagonal)", (out, module.rank), [b], formula, b.dtype)
    if a is module.a and b is module.b:
        return module
    return LowRank(
        module.path, module.kind, a, b, module.alpha, module.scale, module.magnitude, module.bias,
        scale_from=module.scale_from,
    )  # fmt: skip


def _of_expert(pair: ExpertPair) -> LowRank:
    """The pair of one expert as views of the stack's two tensors."""
    stack, index = pair.stack, pair.index
    out = stack.shape[0]
    shared_a, shared_b = stack.shares
    rank, experts = stack.rank, stack.experts
    a, b = stack.a, stack.b
    if b.strides is not None:
        b = joined(b.name, b.shape, [b])
    if not shared_a and experts > 1:
        a = member(a, index) if len(a.shape) == 3 else row_range(a, _run(index, rank))
    elif len(a.shape) == 3:
        a = member(a, 0)
    if shared_b or experts == 1:
        b = member(b, 0) if len(b.shape) == 3 else b
    elif stack.packing == "stacked":
        b = member(b, index)
    elif stack.packing == "grouped":
        b = view(b, (out, rank), index * rank, (experts * rank, 1))
    else:
        b = view(b, (out, rank), index, (experts * rank, experts))
    if pair.swapped:
        a, b = transposed(b), transposed(a)
    return LowRank(pair.path, "linear", a, b, stack.alpha, stack.scale, scale_from=stack.scale_from)


def _run(index: int, size: int) -> range:
    return range(index * size, (index + 1) * size)


def expert_pairs(stack: ExpertStack, swapped: bool) -> Iterator[LowRank]:
    """The pairs of all experts of a stack, in their order; `swapped` if Δ is added transposed."""
    for index in range(stack.experts):
        yield _of_expert(stack.expert(index, swapped))


def fitted(module: LowRank, rank: int, scale: float, dtype: str | None) -> Fitted:
    """The factors of a module at this rank, in a file whose scale is `scale`, in `dtype`.

    What the module's own scale has more goes into B: that is exact for powers of two as long as no
    value leaves the dtype's range. A larger rank is filled up with zeros, which is exact. `rank` is
    not below the module's.
    """
    factor = known_scale(module) / scale
    a = _padded(module.a, rank, 0, 1.0, dtype or module.a.dtype)
    b = _padded(module.b, rank, 1, factor, dtype or module.b.dtype)
    exact = factor == 0 or math.frexp(abs(factor))[0] == 0.5
    said = []
    if rank > module.rank:
        said.append(f"filled up with zeros to rank {rank}")
    if factor != 1:
        said.append(f"B times {factor:.6g}")
    narrower = [t for t in (module.a, module.b) if dtype and _narrows(t.dtype, dtype)]
    if narrower:
        said.append(f"{narrower[0].dtype} written as {dtype}")
    if module.method != "LoRA":
        said.insert(0, f"{module.method} as a product of two factors")
    outcome: Outcome = "rounded" if narrower or not exact else exact_outcome(module)
    fate = Fate(module.path, outcome, ", ".join(said), module.rank, rank)
    return Fitted(a, b, fate)


def exact_outcome(module: LowRank) -> Outcome:
    """What becomes of a module whose factors are written as they are."""
    return "exact" if module.method == "LoRA" else "expanded"


def _narrows(old: str, new: str) -> bool:
    """Whether values of one dtype may not fit another one."""
    return old != new and not (new == "F32" and DTYPE_BITS[old] <= 16)


def _padded(info: TensorInfo, rank: int, axis: int, factor: float, dtype: str) -> TensorInfo:
    more = rank - info.shape[axis]
    if not more and factor == 1 and dtype == info.dtype:
        return info
    shape = tuple(n + more if i == axis else n for i, n in enumerate(info.shape))
    what = f"{info.name} · {factor!r} [{', '.join(map(str, shape))}]"

    def formula(values: Array) -> Array:
        if factor != 1:
            values = values.astype(np.float64) * factor
        widths = [(0, more if i == axis else 0) for i in range(values.ndim)]
        return np.pad(values, widths) if more else values

    return computed_tensor(what, shape, [info], formula, dtype)


def refuse_all(draft: Draft, adapter: Adapter, why: dict[str, str]) -> None:
    """Refuse what an adapter holds beside factors, as `why` says of the kinds "replaced", "rows",
    "functions" that a dialect has no place for."""
    kinds = {
        "replaced": list(adapter.replaced),
        "rows": [f"{path} (token rows)" for path in adapter.token_rows],
        "functions": list(adapter.functions),
    }
    for kind, reason in why.items():
        for what in kinds[kind]:
            draft.refuse(what, reason)
