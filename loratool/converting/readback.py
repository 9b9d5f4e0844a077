"""A converted adapter proves itself: it is read again, and its products are held against the old.

No product is built. ‖s·B·A − s′·B′·A′‖ comes from r × r matrices: of the differences of the factors
where both have the same rank, which is exactly zero for what is written exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import known_scale
from loratool.adapters.dialects.writing import Draft, Fate
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors, Matrix
from loratool.errors import VerifyError, listed
from loratool.storage.computed import Array
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_float32, same_bytes, same_values
from loratool.streams.threads import computed
from loratool.words import counted

Pair = tuple[Matrix, Matrix]

#: More than any dtype that factors are written in rounds off a product.
_BEYOND_ROUNDING = 2.0**-5


def prove(draft: Draft, written: Adapter, threads: int | None) -> None:
    """Hold the adapter that was read again against the pieces of the draft it was written from.

    Fills in the errors of its fates; what was called exact and is not becomes rounded. Raises
    VerifyError where something is missing, is there and should not be, or is not what it was.
    """
    if draft.is_copy:
        _prove_copy(draft, written)
    reasons = (
        [] if draft.is_copy else [f"[{n.code}] {n.message}" for n in written.notices if n.refused]
    )
    missing = [path for path in draft.pieces if path not in written.modules]
    missing += [name for name in draft.whole if name not in written.replaced]
    extra = []
    if not draft.is_copy:
        extra = [path for path in written.modules if path not in draft.pieces]
        extra += [name for name in written.replaced if name not in draft.whole]
    if reasons or missing or extra:
        said = [*reasons, *(f"{path} is not there" for path in missing)]
        said += [f"{path} was not in the adapter" for path in extra]
        raise _broken(said)
    with FilePool() as files:
        calls = [
            partial(_difference, piece, written.modules[path], files)
            for path, piece in draft.pieces.items()
        ]
        errors = dict(zip(draft.pieces, computed(calls, threads), strict=True))
    beside = [
        (name, info, written.replaced[name]) for name, info in draft.whole.items()
    ]  # fmt: skip
    for path, piece in draft.pieces.items():
        found = written.modules[path]
        if (piece.magnitude is None) != (found.magnitude is None):
            raise _broken([f"{path}: its DoRA magnitude"])
        if piece.magnitude is not None and found.magnitude is not None:
            beside.append((f"{path}: its DoRA magnitude", piece.magnitude, found.magnitude))
    other = [what for what, old, new in beside if not _same(old, new)]
    # Not a number is not near either.
    far = {path: error for path, error in errors.items() if not error <= _BEYOND_ROUNDING}
    other += [f"{path}: {error:.3g} off" for path, error in far.items()]
    if other:
        raise _broken(other)
    fates = {fate.what: fate for fate in draft.fates}
    for path, error in errors.items():
        # That of a module of the file, or of the stack that it was in.
        fate = fates.get(path) or fates.get(draft.pieces[path].path)
        if fate is not None:
            _settle(fate, error)


def _prove_copy(draft: Draft, written: Adapter) -> None:
    """Raise VerifyError where a tensor under the adapter's own key is not as drafted."""
    other = [
        key
        for key, info in draft.tensors.items()
        if key not in written.tensors or not same_bytes(info, written.tensors[key])
    ]
    other += [f"{key} was not in the adapter" for key in written.tensors.keys() - draft.tensors]
    if other:
        raise _broken(other)
    for fate in draft.fates:
        fate.error = 0.0  # of what has other bytes than before, products are compared too


def _settle(fate: Fate, error: float) -> None:
    fate.error = (
        math.hypot(error, fate.error or 0.0)
        if fate.outcome == "cut"
        else max(error, fate.error or 0.0)
    )
    if error and fate.outcome in ("exact", "expanded"):
        fate.outcome = "rounded"


def _same(old: TensorInfo, new: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers, whatever axes of length one they have."""
    if old.numel != new.numel:
        return False
    if old.shape == new.shape:
        return same_values(old, new)
    return bool(np.array_equal(read_float32(old).reshape(-1), read_float32(new).reshape(-1)))


def _broken(what: list[str]) -> VerifyError:
    return VerifyError(
        f"The file that was written is not the adapter ({counted(len(what), 'difference')}):\n"
        + listed(what),
        "This is a bug in loratool. Nothing was left behind; please report it.",
    )


def _difference(old: Factors, new: Factors, files: FilePool) -> float:
    """‖s·B·A − s′·B′·A′‖ / ‖s·B·A‖, 0 for two that are zero; of a stack that of all experts."""
    scale, new_scale = known_scale(old), known_scale(new)
    if isinstance(old, ExpertStack) and isinstance(new, ExpertStack):
        if (old.shape, old.experts) != (new.shape, new.experts):
            return math.inf
        found = [
            _apart((b, a), scale, (new_b, new_a), new_scale)
            for (_, bs, as_), (_, new_bs, new_as) in zip(
                old.batches(files), new.batches(files), strict=True
            )
            for b, a, new_b, new_a in zip(bs, as_, new_bs, new_as, strict=True)
        ]
        return _share(*(math.hypot(*norms) for norms in zip(*found, strict=True)))
    one, other = old.left_right(files), new.left_right(files)
    if one is None or other is None or old.shape != new.shape:
        return math.inf
    return relative_difference(one, scale, other, new_scale)


def relative_difference(one: Pair, scale: float, other: Pair, new_scale: float) -> float:
    """‖s·B·A − s′·B′·A′‖ / ‖s·B·A‖ of `(B [out, r], A [r, in])`; ranks may differ by zeros."""
    if scale == new_scale and all(map(np.array_equal, one, other)):
        return 0.0
    return _share(*_apart(one, scale, other, new_scale))


def _share(off: float, size: float) -> float:
    return 0.0 if off == 0 else off / size if size > 0 else math.inf


def _apart(one: Pair, scale: float, other: Pair, new_scale: float) -> tuple[float, float]:
    """‖s·B·A − s′·B′·A′‖ and ‖s·B·A‖."""
    size = abs(scale) * _norm([one[0]], [one[1]])
    if not scale or not new_scale:  # there is one product at most
        return size or abs(new_scale) * _norm([other[0]], [other[1]]), size
    rank = max(len(one[1]), len(other[1]))
    factor = new_scale / scale
    # A power of two changes no digit, so float32 holds the difference of what it held.
    wide = np.float32 if math.frexp(abs(factor))[0] == 0.5 else np.float64
    b, a = _padded(one[0], rank, 1).astype(wide, copy=False), _padded(one[1], rank, 0)
    new_b, new_a = _padded(other[0], rank, 1) * wide(factor), _padded(other[1], rank, 0)
    off_b, off_a = new_b - b, new_a - a
    if not off_b.any() and not off_a.any():
        return 0.0, size
    # Δ' - Δ = [δB B']·[A; δA], whose Gram matrices have nothing to cancel.
    return abs(scale) * _norm([off_b, new_b], [a, off_a]), size


def _padded(factor: Matrix, rank: int, axis: int) -> Matrix:
    more = rank - factor.shape[axis]
    return np.pad(factor, [(0, more if i == axis else 0) for i in (0, 1)]) if more else factor


def _norm(left: Sequence[Array], right: Sequence[Array]) -> float:
    """‖[L₁ L₂ …]·[R₁; R₂; …]‖. Float32 is enough for a norm, of parts that are near 1."""
    units, sizes = zip(*(_unit(part) for part in (*left, *right)), strict=True)
    count = len(left)
    total = 0.0
    for i in range(count):
        for j in range(count):
            k, m = count + i, count + j
            inner_b = (units[i].T @ units[j]).astype(np.float64) * (sizes[i] * sizes[j])
            inner_a = (units[k] @ units[m].T).astype(np.float64) * (sizes[k] * sizes[m])
            total += float(np.sum(inner_b * inner_a))
    return math.sqrt(max(0.0, total))


def _unit(part: Array) -> tuple[Matrix, float]:
    """A part in float32 and what it was divided by, so that no square leaves the range."""
    size = float(max(part.max(initial=0.0), -part.min(initial=0.0)))
    if size == 0 or 1e-9 < size < 1e9:
        return part.astype(np.float32, copy=False), 1.0
    return (part / size).astype(np.float32), size
