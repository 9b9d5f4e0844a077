"""What a comparison counts of a tensor, and what that means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratool.merging.plan import Job

#: Upper ends of the bins that distances in units in the last place are counted in.
BINS = (0, 1, 2, 4, 16, 256)


@dataclass
class Stats:
    """What a comparison of one tensor counted. Sums of squares and products are over elements.

    W is the base, x = W + Δ, E the once-rounded x, M the merged tensor; Δ includes what DoRA does.
    `inside_…` leave out elements outside of all tolerances where these are few in their block.
    """

    elements: int = 0
    equal: int = 0
    #: Elements that differ by no more than another rounding to half precision explains.
    rounding: int = 0
    outside: int = 0
    #: Elements unlike the base's in blocks where some were not as expected.
    unlike_base: int = 0
    bins: list[int] = field(default_factory=lambda: [0] * (len(BINS) + 1))
    largest_ulp: int = 0
    largest: float = 0.0
    delta: float = 0.0  # Σ Δ²
    change: float = 0.0  # Σ (M - W)²
    along: float = 0.0  # Σ (M - W)·Δ
    inside_along: float = 0.0
    inside_apart: float = 0.0  # Σ (M - E)²
    expected_along: float = 0.0  # Σ (E - W)·Δ
    lost: float = 0.0  # Σ (M - x)²
    expected_lost: float = 0.0  # Σ (E - x)²
    #: Of the elements looked at closely: those where E is not W, and where M is W nevertheless.
    to_move: int = 0
    unmoved: int = 0
    #: Elements that ways of rounding were tried on; by way, how many it misses, and by far; how
    #: many it moves away from the base, and how many of these are as it says.
    tried: int = 0
    astray: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Stats) -> Stats:
        for name, value in other.__dict__.items():
            mine = getattr(self, name)
            if name == "bins":
                self.bins = [a + b for a, b in zip(mine, value, strict=True)]
            elif isinstance(mine, Counter):
                mine.update(value)  # unlike +, it keeps what was counted as 0
            elif name in ("largest", "largest_ulp"):
                setattr(self, name, max(mine, value))
            else:
                setattr(self, name, mine + value)
        return self


#: Findings that mean "this is base + adapters".
SOUND = (
    "once",
    "rounded-twice",
    "low-precision",
    "requantised",
    "same",
    "same-rounded",
    "same-quantised",
)


#: A weight this near to 1 is 1.
_NEAR = 0.02


@dataclass(frozen=True)
class Finding:
    """One tensor of the merged model: `code` says what became of it.

    once, rounded-twice, low-precision: merged, with one rounding, two, or a product in half
    precision. same, same-rounded, same-quantised: as the adapter leaves it. not-merged; weight:
    merged with `applied` times what it should be; weights: with another weight for each adapter,
    `by_adapter`;
    requantised: merged and quantised again; delta-lost: the same, and too little is left of the
    delta (`note` says how much); original: of the model that the base was quantised from;
    damaged: merged, but some values are off; other: changed in a way the adapters do not explain;
    changed: touched although no adapter does; missing, added, shape, dtype: the tensor itself is
    not as expected.
    """

    tensor: str
    code: str
    adapted: bool
    elements: int = 0
    #: Share of elements equal to the once-rounded result.
    equal: float = 0.0
    #: Distances in units in the last place, by the upper end of their bin ("0", "1", …, "more").
    ulps: dict[str, int] = field(default_factory=dict)
    largest_ulp: int = 0
    largest: float = 0.0
    #: Least-squares coefficient of (merged - base) on the delta; None where there is no delta.
    applied: float | None = None
    #: The same, set against that of the right merge, of which rounding may have taken a part.
    times: float | None = None
    #: Share of ‖merged - base‖ that is neither along the delta nor rounding.
    unexplained: float | None = None
    #: ‖realised - Δ‖/‖Δ‖: how much of the delta rounding lost.
    lost: float | None = None
    #: Values beyond every tolerance.
    off: int = 0
    way: str = ""
    note: str = ""
    #: With several adapters the applied weight of each, where the verdict is not clear without.
    by_adapter: dict[str, float] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return self.code in SOUND

    @property
    def module(self) -> str:
        return self.tensor.removesuffix(".weight")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def judge(job: Job, stats: Stats) -> Finding:
    """The finding for a tensor that both models have."""
    arithmetic, replaced = job.is_change, job.is_adapted and not job.is_change
    code, way = _code(stats, arithmetic, replaced)
    applied = unexplained = lost = None
    if arithmetic and stats.delta > 0:
        along = stats.inside_along if code == "damaged" else stats.along
        applied = _finite(along / stats.delta)
        lost = _finite(math.sqrt(stats.lost / stats.delta) if stats.lost >= 0 else math.nan)
        unexplained = _unexplained(stats)
    labels = [str(end) for end in BINS] + ["more"]
    return Finding(
        job.name, code, arithmetic or replaced, stats.elements,
        stats.equal / stats.elements if stats.elements else 1.0,
        dict(zip(labels, stats.bins, strict=True)), stats.largest_ulp, stats.largest,
        applied, _ratio(stats), unexplained, lost, stats.outside, way,
    )  # fmt: skip


def _code(stats: Stats, arithmetic: bool, replaced: bool) -> tuple[str, str]:
    if not arithmetic:
        if stats.equal == stats.elements:
            return "same", ""
        way = next((way for way, missed in stats.missed.items() if not missed), "")
        return ("same-rounded", way) if way else ("other" if replaced else "changed", "")
    off = stats.rounding + stats.outside
    if not off and (stats.equal == stats.elements or _applied_right(stats, 0.01, 5)):
        return "once", ""
    if (
        not stats.unlike_base
        and stats.unmoved == stats.to_move
        and (
            # One value may be the base's by chance; many may not.
            100 * stats.to_move > stats.elements or not _applied_right(stats, 0.5)
        )
    ):
        return "not-merged", ""
    way = _proven_way(stats)
    if way:
        return ("low-precision" if way.startswith("product") else "rounded-twice"), way
    few = off <= max(2, stats.elements // 1000) and off * 8 <= stats.elements
    if few and _applied_right(stats, 0.05, 5):
        return "damaged", ""
    if not stats.outside and _applied_right(stats, 0.004, 4) and _scatter(stats) < 0.02:
        return "low-precision", ""
    unexplained, ratio = _unexplained(stats), _ratio(stats)
    if unexplained is None or ratio is None or unexplained > 0.1:
        return "other", ""
    if abs(ratio) < _NEAR:
        return "not-merged", ""
    few = stats.outside <= max(8, stats.elements // 1000)
    return ("damaged" if abs(ratio - 1) <= _NEAR and few else "weight"), ""


def _proven_way(stats: Stats) -> str:
    """The way of rounding that gives all values, and all those that it moves off the base."""
    for way, missed in sorted(stats.missed.items(), key=lambda item: item[1]):
        moved = stats.moved[way]
        right = missed <= stats.tried // 1000 and stats.met[way] >= 0.98 * moved > 0
        if right and not stats.astray[way] and 4 * missed <= stats.rounding + stats.outside:
            return way
    return ""


def split_by_adapter(
    finding: Finding,
    asked: Sequence[tuple[str, float]],
    weights: Sequence[float],
    rest: float,
    stats: Stats,
) -> Finding:
    """The finding for a tensor that holds each adapter with a weight of its own, if it does.

    `asked` names the adapters and their weights, of which it holds `weights` times as much.
    """
    known = (rest, stats.change, stats.expected_lost, *weights)
    if not all(map(math.isfinite, known)) or not stats.change > 0:
        return finding
    left = math.sqrt(max(0.0, rest - 3 * stats.expected_lost) / stats.change)
    if not left <= 0.1 or all(abs(w - weights[0]) < _NEAR for w in weights):
        return finding
    shown = {
        name: 0.0 if abs(times) < 0.005 else round(times * weight, 4)
        for (name, weight), times in zip(asked, weights, strict=True)
    }
    return replace(finding, code="weights", by_adapter=shown, unexplained=left)


def _ratio(stats: Stats) -> float | None:
    """The applied weight, set against what rounding leaves of the right one."""
    if not stats.delta > 0:
        return None
    if not stats.expected_along > 0.05 * stats.delta:
        return None  # rounding leaves too little of it to tell
    return _finite(stats.along / stats.expected_along)


def _scatter(stats: Stats) -> float:
    """How far the differences from the expected values may move the applied weight by chance.

    Errors that do not follow the delta have a random part along it: √(‖M - E‖²‖Δ‖²/n).
    """
    if not stats.delta > 0 or not stats.expected_along > 0 or not stats.inside_apart >= 0:
        return math.inf
    return math.sqrt(stats.inside_apart * stats.delta / stats.elements) / stats.expected_along


def _applied_right(stats: Stats, share: float, scatters: float = 0) -> bool:
    """Whether the part along the delta is what it should be."""
    if not stats.expected_along > 0 or not math.isfinite(stats.inside_along):
        return False
    return abs(stats.inside_along / stats.expected_along - 1) <= share + scatters * _scatter(stats)


def _unexplained(stats: Stats) -> float | None:
    if not stats.delta > 0 or not stats.change > 0:
        return None
    # ‖M - W - cΔ‖², twice the same but for cancellation: the first is good for c near 0, the second
    # for c near 1.
    weight = stats.along / stats.delta
    if not math.isfinite(stats.change) or not math.isfinite(stats.along):
        return None
    rest = min(
        stats.change - weight * stats.along, stats.lost - (1 - weight) ** 2 * stats.delta
    ) - 3 * stats.expected_lost  # fmt: skip
    return _finite(math.sqrt(max(0.0, rest) / stats.change))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------- in words
