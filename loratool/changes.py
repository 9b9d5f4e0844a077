"""What becomes of the modules of an adapter whose ranks change, module by module and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratool.adapter import Notice
from loratool.checkpoint.tensors import as_float32
from loratool.errors import ValueRangeError, listed
from loratool.formats.peft_config import owner
from loratool.formats.peft_writer import Bytes
from loratool.joining import Joined, Part
from loratool.linalg.lowrank import Factor, Float64, decompose
from loratool.linalg.ranks import Criterion

#: From this share on, rounding to half precision is worth a warning: bfloat16 takes about 0.3 %.
_LARGE_ROUNDING = 0.01


@dataclass(frozen=True)
class Shrunk:
    """New factors of one module.

    `b [out, k]` and `a [k, in]` are sorted by singular value, so that the first columns are the
    best of their number; `squares [k]` are the squared singular values, and `energy` the ‖·‖² of
    what they stand for, with what was cut. `rank` is how many the criterion wants. `ranks` are
    those of the inputs, `from_sum` is ‖result − Σ wᵢsᵢBᵢAᵢ‖/‖Σ‖ for methods that are no sum.
    `alive` is False where A or B is zero in all the inputs.
    """

    path: str
    parts: list[Part]
    b: Factor
    a: Factor
    squares: Float64
    energy: float
    rank: int
    from_sum: float | None = None
    rounding: float | None = None
    alive: bool = True


@dataclass(frozen=True)
class ModuleChange:
    """One module of the new adapter. `ranks` are those of the inputs, None where it was not there.

    `kept` is the share of ‖ΔW‖² that the new rank holds, None for a module that does nothing;
    `error` is ‖cut off‖/‖ΔW‖. `norm` is ‖ΔW‖ before the cut. `rounding` is what rounding the
    factors to half precision adds to the error, None for float32.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    ranks: tuple[int | None, ...]
    rank: int
    norm: float
    kept: float | None
    error: float
    from_sum: float | None = None
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape), "ranks": list(self.ranks)}


def shrink(
    path: str,
    parts: list[Part],
    b: Factor,
    a: Factor,
    scale: float,
    criterion: Criterion,
    whole: bool,
    energy: float | None = None,
) -> Shrunk:
    """The factors of `scale·b·a` that the criterion asks for; all if `whole`, to be cut later.

    `energy` is the ‖·‖² that the product approximates, if it is not exact.
    """
    found = decompose(b, a, scale)
    total = found.energy if energy is None else energy
    rank = criterion.choose(found.values, total)
    new_b, new_a = found.factors(None if whole else rank)
    return Shrunk(path, parts, new_b, new_a, found.values[: len(new_a)] ** 2, total, rank)


@dataclass
class Changes:
    """What becomes of all modules, and the rank of the adapter.

    `kept`, `error` and `rounding` are those of `ModuleChange`, over all modules together.
    """

    modules: list[ModuleChange]
    rank: int
    kept: float | None
    error: float
    rounding: float | None
    notices: list[Notice]


def rounding_loss(b: Factor, a: Factor, data: Bytes, dtype: str) -> float:
    """About ‖B'A' − BA‖/‖BA‖ of the rounded factors in `data`, as `encode` made it.

    To first order, and with the columns of B orthogonal to each other, and the rows of A, it is
    `√Σ(‖δbₖ‖²‖aₖ‖² + ‖bₖ‖²‖δaₖ‖²) / √Σ‖bₖ‖²‖aₖ‖²`.
    """
    rounded = as_float32(data, dtype)
    squares = []
    for exact, found in ((a, rounded[: a.size]), (b.T, rounded[a.size :])):
        squares.append(np.einsum("ij,ij->i", exact, exact))
        off = exact - found.reshape(exact.shape)
        squares.append(np.einsum("ij,ij->i", off, off))
    size_a, off_a, size_b, off_b = squares
    size = float(size_b @ size_a)
    return float(np.sqrt((off_b @ size_a + size_b @ off_a) / size)) if size else 0.0


def measure(joined: Joined, shrunk: list[Shrunk], least: int, multiple: int) -> Changes:
    """The final ranks, equal for all modules unless `multiple` is 0, and what they keep."""
    changes = _changes(joined, shrunk, _final_ranks(shrunk, least, multiple))
    total = sum(m.energy for m in shrunk)
    kept = sum((c.kept or 0.0) * m.energy for c, m in zip(changes, shrunk, strict=True))
    notices = []
    silent = [m.path for m in shrunk if m.energy == 0]
    if silent:
        text = f"{len(silent)} modules of the result do nothing, their delta is zero:\n"
        notices.append(Notice("zero-delta", text + listed(silent), silent[0]))
    rounding = None
    if any(c.rounding is not None for c in changes):
        lost = sum(
            (c.kept or 0.0) * m.energy * (c.rounding or 0.0) ** 2
            for c, m in zip(changes, shrunk, strict=True)
        )
        rounding = math.sqrt(lost / kept)
        if rounding > _LARGE_ROUNDING:
            text = f"Rounding the factors changes the delta by {rounding:.1%}. Write float32."
            notices.append(Notice("rounding-large", text))
    return Changes(
        changes, max(c.rank for c in changes), kept / total, math.sqrt(max(0.0, 1 - kept / total)),
        rounding, notices,
    )  # fmt: skip


def refuse_nothing(shrunk: list[Shrunk], why: str, hint: str) -> None:
    """Raise ValueRangeError if all modules are zero; `why` if it is not the inputs' fault."""
    if any(m.energy > 0 for m in shrunk):
        return
    if any(m.alive for m in shrunk):
        raise ValueRangeError(f"The result does nothing: every module is zero, {why}.", hint)
    raise ValueRangeError(
        "The input does nothing: in every module A or B is zero.",
        "It is an untrained adapter, or a file that lost its values; `loratool inspect` shows it.",
    )


def _final_ranks(shrunk: list[Shrunk], least: int, multiple: int) -> list[int]:
    if multiple:
        largest = max(least, *(m.rank for m in shrunk))
        return [-(-largest // multiple) * multiple] * len(shrunk)
    # The two parts of an attention module share one rank.
    shared: dict[str, int] = {}
    owners = [owner(m.parts[0].module) for m in shrunk]
    for name, m in zip(owners, shrunk, strict=True):
        shared[name] = max(m.rank, shared.get(name, 0))
    return [shared[name] for name in owners]


def _changes(joined: Joined, shrunk: list[Shrunk], ranks: list[int]) -> list[ModuleChange]:
    changes = []
    for m, rank in zip(shrunk, ranks, strict=True):
        before: list[int | None] = [None] * len(joined.adapters)
        for part in m.parts:
            before[part.index] = part.module.rank
        module = m.parts[0].module
        kept = min(float(m.squares[:rank].sum()) / m.energy, 1.0) if m.energy else None
        changes.append(
            ModuleChange(
                m.path, module.kind, module.shape, tuple(before), rank, math.sqrt(m.energy), kept,
                0.0 if kept is None else math.sqrt(1 - kept), m.from_sum, m.rounding,
            )
        )  # fmt: skip
    return changes
