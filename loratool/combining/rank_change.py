"""What becomes of the modules of an adapter whose ranks change: their ranks, what they keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loratool.combining.alignment import Contribution, Joined
from loratool.combining.doubts import NO_DOUBTS, Doubtful, Doubts, notices_of
from loratool.errors import ValueRangeError, listed
from loratool.linalg.chance import SINGLE, Spectrum
from loratool.linalg.lowrank import Factor, Float64, decompose
from loratool.linalg.noise import noise_edge
from loratool.linalg.ranks import Criterion
from loratool.notices import Notice
from loratool.words import counted

#: From this share on, rounding to half precision is worth a warning: bfloat16 takes about 0.3 %.
_LARGE_ROUNDING = 0.01


@dataclass(frozen=True)
class NewFactors:
    """New factors of one module.

    The columns of `b [out, k]` and rows of `a [k, in]` are sorted by singular value, so that the
    first are the best of their number, unless the method's own factors are the answer. `squares`
    are the squared singular values, and `energy` the ‖·‖² of what they stand for, with what was
    cut. `rank` is how many the criterion wants. `sum_parts` compares with the weighted sum Σ, for
    methods that give something else: ⟨bₖaₖ, Σ⟩ for each k, and ‖Σ‖². `rounding` is what half
    precision takes. `alive` has the adapters (by their place) in which neither A nor B is zero.
    `share` is what the method kept of the sum's ‖·‖² before it made something else of it.
    """

    path: str
    parts: list[Contribution]
    b: Factor
    a: Factor
    squares: Float64
    energy: float
    rank: int
    sum_parts: tuple[Float64, float] | None = None
    rounding: float | None = None
    alive: frozenset[int] = frozenset()
    share: float = 1.0
    doubts: Doubts = NO_DOUBTS


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
    parts: list[Contribution],
    b: Factor,
    a: Factor,
    scale: float,
    criterion: Criterion,
    whole: bool,
    energy: float | None = None,
    rounding: float = SINGLE,
) -> NewFactors:
    """The factors of `scale·b·a` that the criterion asks for; all that its cap allows if `whole`,
    to be cut later.

    `energy` is the ‖·‖² that the product approximates, if it is not exact, and `rounding` that of
    the numbers it was made of.
    """
    found = decompose(b, a, scale)
    total = found.energy if energy is None else energy
    shape = (b.shape[0], a.shape[1])
    rank = criterion.choose(found.values, total, shape)
    new_b, new_a = found.factors(criterion.max_rank if whole else rank)
    edge = noise_edge(found.values, *shape) if criterion.noise else None
    doubts = Doubts(Spectrum(found.values, rounding), rounding=rounding, edge=edge)
    squares = found.values[: len(new_a)] ** 2
    return NewFactors(path, parts, new_b, new_a, squares, total, rank, doubts=doubts)


@dataclass(frozen=True)
class RankPolicy:
    """Which rank a module is written with, given those that the criterion wants.

    With `uniform` the largest of them for all, at least `least` if a module is that wide, and
    raised to a multiple of `multiple`; modules with fewer singular values are filled up with zeros.
    """

    uniform: bool
    least: int = 1
    multiple: int = 1

    def ranks(self, shrunk: list[NewFactors]) -> list[int]:
        if self.uniform:
            widest = max(min(m.parts[0].module.shape) for m in shrunk)
            largest = max(min(self.least, widest), *(m.rank for m in shrunk))
            return [-(-largest // self.multiple) * self.multiple] * len(shrunk)
        # The two parts of an attention module share one rank.
        shared: dict[str, int] = {}
        owners = [m.parts[0].module.outline.rank_owner for m in shrunk]
        for name, m in zip(owners, shrunk, strict=True):
            shared[name] = max(m.rank, shared.get(name, 0))
        return [shared[name] for name in owners]


@dataclass
class Changes:
    """What becomes of all modules, and the rank of the adapter.

    `kept`, `error`, `from_sum`, `rounding` are those of `ModuleChange`, over all modules together.
    """

    modules: list[ModuleChange]
    rank: int
    kept: float | None
    error: float
    from_sum: float | None
    rounding: float | None
    notices: list[Notice]


def changes_at(joined: Joined, shrunk: list[NewFactors], ranks: list[int]) -> Changes:
    """What the modules keep at these ranks."""
    changes = _changes(joined, shrunk, ranks)
    energies = [change.norm**2 for change in changes]
    total = sum(energies)
    kept = sum((c.kept or 0.0) * energy for c, energy in zip(changes, energies, strict=True))
    notices = []
    silent = [m.path for m in shrunk if m.energy == 0]
    if silent:
        text = (
            f"{counted(len(silent), 'module', 'has')} no effect in the result: the delta is zero:\n"
        )
        notices.append(Notice("zero-delta", text + listed(silent), silent[0]))
    notices += _idle(joined, shrunk)
    notices += notices_of(
        [
            Doubtful(m.path, min(rank, len(m.squares)), math.sqrt(m.energy), m.doubts)
            for m, rank in zip(shrunk, ranks, strict=True)
            if m.energy > 0
        ]
    )
    rounding = None
    if any(c.rounding is not None for c in changes):
        lost = sum(
            (c.kept or 0.0) * energy * (c.rounding or 0.0) ** 2
            for c, energy in zip(changes, energies, strict=True)
        )
        rounding = math.sqrt(lost / kept)
        if rounding > _LARGE_ROUNDING:
            text = f"Rounding the factors changes the delta by {rounding:.1%}. Write float32."
            notices.append(Notice("rounding-large", text))
    return Changes(
        changes, max(c.rank for c in changes), kept / total, math.sqrt(max(0.0, 1 - kept / total)),
        _sum_distance(changes, shrunk), rounding, notices,
    )  # fmt: skip


def _idle(joined: Joined, shrunk: list[NewFactors]) -> list[Notice]:
    """The adapters that add nothing to any module."""
    alive = frozenset[int]().union(*(m.alive for m in shrunk))
    return [
        Notice(
            "zero-adapter",
            f"{adapter.label} does nothing: in every module A or B is zero.",
            adapter.label,
        )
        for index, adapter in enumerate(joined.adapters)
        if joined.weights[index] and index not in alive
    ]


def refuse_nothing(shrunk: list[NewFactors], why: str, hint: str) -> None:
    """Raise ValueRangeError if all modules are zero; `why` if it is not the inputs' fault."""
    if any(m.energy > 0 for m in shrunk):
        return
    if any(m.alive for m in shrunk):
        raise ValueRangeError(f"The result does nothing: every module is zero, {why}.", hint)
    raise ValueRangeError(
        "The input does nothing: in every module A or B is zero.",
        "It is an untrained adapter, or a file that lost its values; `loratool inspect` shows it.",
    )


def _changes(joined: Joined, shrunk: list[NewFactors], ranks: list[int]) -> list[ModuleChange]:
    changes = []
    for m, rank in zip(shrunk, ranks, strict=True):
        before: list[int | None] = [None] * len(joined.adapters)
        for part in m.parts:
            before[part.index] = part.module.rank
        module = m.parts[0].module
        kept = None
        if m.energy:
            kept = min(float(m.squares[:rank].sum()) / m.energy, 1.0) * m.share
        changes.append(
            ModuleChange(
                m.path, module.kind, module.shape, tuple(before), rank,
                math.sqrt(m.energy) * m.parts[0].doubling, kept,
                0.0 if kept is None else math.sqrt(1 - kept), _from_sum(m, rank), m.rounding,
            )
        )  # fmt: skip
    return changes


def _sum_distance(changes: list[ModuleChange], shrunk: list[NewFactors]) -> float | None:
    """‖result − Σ‖/‖Σ‖ over all modules."""
    off = size = 0.0
    for change, m in zip(changes, shrunk, strict=True):
        if change.from_sum is not None and m.sum_parts is not None:
            own = m.sum_parts[1] * m.parts[0].doubling ** 2
            off, size = off + change.from_sum**2 * own, size + own
    return math.sqrt(off / size) if size else None


def _from_sum(m: NewFactors, rank: int) -> float | None:
    """‖result − Σ‖/‖Σ‖ of the result cut to this rank; None for Σ itself, and where Σ is zero."""
    if m.sum_parts is None or m.sum_parts[1] <= 0:
        return None
    products, size = m.sum_parts
    off = float(m.squares[:rank].sum()) - 2 * float(products[:rank].sum()) + size
    return math.sqrt(max(0.0, off) / size)
