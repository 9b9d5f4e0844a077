"""What an audit finds: modules that do nothing, take too much room, or stand out among their like.

A check goes through all modules and gives `Sighting`s, one for each module; `folded` makes of those
of one sort and one kind of module a `AuditFinding`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratool.auditing.spectra import ENOUGH, ModuleAudit
from loratool.paths import pattern
from loratool.words import percent, span_text

Code = Literal[
    "not-finite", "dead", "dead-experts", "faint", "rank-unused", "rank-excess", "all-noise",
    "noise", "scale-outlier", "norm-outlier", "spike", "spike-outlier", "large-against-base",
]  # fmt: skip

#: ‖ΔW‖ below this share of the median of all modules does nothing beside them.
_FAINT = 0.01

#: A rank that is at least so many times what 99 % of ‖ΔW‖² take is too much.
_EXCESS = 2.0

#: Of one kind of module in so many layers, what is so many times the median absolute deviation from
#: the median, and this factor at least, is an outlier. 1.4826 makes the deviation that of a normal
#: distribution. Scales are chosen, not trained, so a smaller factor tells.
_LAYERS, _DEVIATIONS, _FACTOR, _SCALE_FACTOR = 5, 5 * 1.4826, 3.0, 1.5

#: One direction with this share of ‖ΔW‖² and this many times the next value is a spike.
_SHARE, _GAP = 0.9, 5.0

#: From this ‖ΔW‖/‖W‖ on, an adapter rather replaces a weight than adjusts it.
_LARGE = 0.3


@dataclass(frozen=True)
class Sighting:
    """One module of a finding, and the number that speaks of it."""

    code: Code
    module: ModuleAudit
    number: float = 0.0


@dataclass(frozen=True)
class AuditFinding:
    """The same of modules that are alike but for their layers. `figure` is what was measured, in
    words; `numbers` are those of the modules, in their order."""

    code: Code
    modules: tuple[str, ...]
    figure: str
    numbers: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "modules": list(self.modules), "numbers": list(self.numbers)}


def found_in(modules: Sequence[ModuleAudit]) -> list[AuditFinding]:
    """All findings, the gravest first."""
    sightings = [s for check in (_each, _faint, _outliers) for s in check(modules)]
    order = list(_FIGURES)
    groups: dict[tuple[int, str], list[Sighting]] = defaultdict(list)
    for sighting in sightings:
        groups[order.index(sighting.code), pattern(sighting.module.path)].append(sighting)
    ranks = sorted({rank for rank, _ in groups})
    return [_folded(group) for rank in ranks for (own, _), group in groups.items() if own == rank]


def _folded(group: Sequence[Sighting]) -> AuditFinding:
    code = group[0].code
    numbers = () if code in ("not-finite", "dead") else tuple(s.number for s in group)
    return AuditFinding(
        code, tuple(s.module.path for s in group), _FIGURES[code](group), numbers
    )  # fmt: skip


def _each(modules: Sequence[ModuleAudit]) -> Iterator[Sighting]:
    """What a module's own figures say."""
    for m in modules:
        if not m.finite:
            yield Sighting("not-finite", m)
        if m.dead:
            yield Sighting("dead", m)
        if m.dead_experts and not m.dead:
            yield Sighting("dead-experts", m, m.dead_experts)
        if m.rank_used is None or m.rank_enough is None or m.first_share is None:
            continue
        if m.rank_enough * _EXCESS <= m.rank:
            yield Sighting("rank-excess", m, m.rank_enough)
        elif m.rank_used < m.rank:
            yield Sighting("rank-unused", m, m.rank_used)
        if m.above_noise == 0:
            yield Sighting("all-noise", m, 0)
        elif m.above_noise is not None and m.above_noise < m.rank_used:
            yield Sighting("noise", m, m.above_noise)
        if m.gap is not None and m.first_share >= _SHARE and m.gap >= _GAP:
            yield Sighting("spike", m, m.first_share)
        if m.relative_norm is not None and m.relative_norm >= _LARGE:
            yield Sighting("large-against-base", m, m.relative_norm)


def _faint(modules: Sequence[ModuleAudit]) -> Iterator[Sighting]:
    """Modules whose delta is negligible beside those of the others."""
    sizes = [(m, m.norm) for m in modules if m.norm and not m.dead]
    if len(sizes) < 2:
        return
    usual = statistics.median(size for _, size in sizes)
    for m, size in sizes:
        if size < _FAINT * usual:
            yield Sighting("faint", m, size / usual)


def _outliers(modules: Sequence[ModuleAudit]) -> Iterator[Sighting]:
    """Modules far off those of their kind in the other layers, by the logarithms."""
    kinds: dict[str, list[ModuleAudit]] = defaultdict(list)
    for m in modules:
        if m.measured and not m.dead:
            kinds[pattern(m.path)].append(m)
    for alike in kinds.values():
        by_size = _far(alike, lambda m: m.norm, _FACTOR)
        large = {m.path for m, _ in by_size}
        by_first = _far(alike, _first_value, _FACTOR)
        by_scale = _far(alike, lambda m: abs(m.scale) if m.scale else None, _SCALE_FACTOR)
        yield from (Sighting("scale-outlier", m, times) for m, times in by_scale)
        yield from (Sighting("norm-outlier", m, times) for m, times in by_size)
        yield from (
            Sighting("spike-outlier", m, times) for m, times in by_first if m.path not in large
        )


def _first_value(m: ModuleAudit) -> float | None:
    return m.singular_values[0] if m.norm is not None and m.singular_values else None


def _far(
    alike: Sequence[ModuleAudit], value: Callable[[ModuleAudit], float | None], factor: float
) -> list[tuple[ModuleAudit, float]]:
    """The modules that are far off the median, and how many times that they are."""
    known = [(m, math.log(v)) for m in alike if (v := value(m))]
    if len(known) < _LAYERS:
        return []
    middle = statistics.median(log for _, log in known)
    deviation = statistics.median(abs(log - middle) for _, log in known)
    limit = max(_DEVIATIONS * deviation, math.log(factor))
    return [(m, math.exp(log - middle)) for m, log in known if abs(log - middle) > limit]


def _of_ranks(group: Sequence[Sighting]) -> str:
    return (
        f"{whole_span([s.number for s in group])} of {whole_span([s.module.rank for s in group])}"
    )


def whole_span(numbers: Sequence[float]) -> str:
    """ "4" or "4–8" of whole numbers."""
    low, high = f"{min(numbers):.0f}", f"{max(numbers):.0f}"
    return low if low == high else f"{low}–{high}"


def _times(group: Sequence[Sighting]) -> str:
    return f"{span_text([s.number for s in group])} × the median"


def _shares(group: Sequence[Sighting]) -> str:
    low, high = (percent(f(s.number for s in group)) for f in (min, max))
    return low if low == high else f"{low}–{high}"


def _noise_figure(group: Sequence[Sighting]) -> str:
    kept = min(s.module.noise_kept or 0.0 for s in group)
    return f"{_of_ranks(group)} hold ≥ {percent(kept)}"


def _scale_figure(group: Sequence[Sighting]) -> str:
    scales = span_text([s.module.scale for s in group])
    return f"scale {scales}, {_times(group)}"


#: What was measured, in words; the gravest first.
_FIGURES: dict[Code, Callable[[Sequence[Sighting]], str]] = {
    "not-finite": lambda group: "NaN or infinity",
    "dead": lambda group: ", ".join(dict.fromkeys(s.module.dead for s in group)),
    "dead-experts": lambda group: f"{whole_span([s.number for s in group])} of its experts",
    "faint": lambda group: f"‖ΔW‖ {_times(group)}",
    "scale-outlier": _scale_figure,
    "norm-outlier": lambda group: f"‖ΔW‖ {_times(group)}",
    "spike-outlier": lambda group: f"σ₁ {_times(group)}",
    "spike": lambda group: f"σ₁²/‖ΔW‖² {_shares(group)}",
    "large-against-base": lambda group: f"‖ΔW‖/‖W‖ {_shares(group)}",
    "rank-unused": lambda group: f"{_of_ranks(group)} not zero",
    "rank-excess": lambda group: f"{_of_ranks(group)} hold {percent(ENOUGH)}",
    "all-noise": lambda group: f"none of {whole_span([s.module.rank for s in group])} above",
    "noise": _noise_figure,
}
