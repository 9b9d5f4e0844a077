"""What became of a counterpart that has been read: how much it changed, and of its factors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from loratool.extracting.counterparts import Counterpart
from loratool.extracting.difference import Size
from loratool.linalg.lowrank import Float64

NOTHING = Size(0.0, 0.0, False, 0.0)


@dataclass(frozen=True)
class Decomposed:
    """What is known of one counterpart after it has been read.

    `values` are the singular values of the factors that were put away, `following` those known
    beyond. `cut` is ‖Δ - B·A‖² at that rank, and `least` what any factors of that rank have at
    least. `rounding` is what the factors' dtype takes of B·A. With `noise` the change is rounding
    alone, and is to be left out.
    """

    part: Counterpart
    size: Size = NOTHING
    values: Float64 = field(default_factory=partial(np.zeros, 0))
    following: Float64 = field(default_factory=partial(np.zeros, 0))
    cut: float = 0.0
    least: float = 0.0
    rounding: float | None = None
    passes: int = 0
    noise: bool = False

    @property
    def changed(self) -> bool:
        """Whether there is something to hold."""
        return self.size.changed and not self.noise

    def at(self, rank: int) -> tuple[float, float]:
        """`cut` and `least` for the first `rank` of the factors."""
        more = float((self.values[rank:] ** 2).sum())
        return self.cut + more, self.least + more

    @property
    def facts(self) -> dict[str, Any]:
        """All of it but the part, as JSON can hold it without rounding."""
        return {
            "size": asdict(self.size), "values": self.values.tolist(),
            "following": self.following.tolist(), "cut": self.cut, "least": self.least,
            "rounding": self.rounding, "passes": self.passes, "noise": self.noise,
        }  # fmt: skip

    @classmethod
    def of(cls, part: Counterpart, facts: dict[str, Any]) -> Decomposed:
        """What these `facts` were made of."""
        arrays = {name: np.array(facts[name], np.float64) for name in ("values", "following")}
        return cls(part, **{**facts, **arrays, "size": Size(**facts["size"])})


def joined_stacks(found: Iterable[Decomposed]) -> list[Decomposed]:
    """The same with one for all matrices of a stack, where the first of them is."""
    units: dict[str, list[Decomposed]] = defaultdict(list)
    for one in found:
        units[one.part.unit].append(one)
    return [_joined(own) if own[0].part.stack else own[0] for own in units.values()]


def _joined(found: list[Decomposed]) -> Decomposed:
    """All matrices of a stack as one: their k-th singular values count together as the k-th."""
    part = replace(found[0].part, name=found[0].part.unit)
    sizes = [f.size for f in found]
    size = Size(
        energy=math.fsum(s.energy for s in sizes), weight=math.fsum(s.weight for s in sizes),
        changed=any(s.changed for s in sizes), noise=math.fsum(s.noise for s in sizes),
        quantising=math.fsum(s.quantising for s in sizes),
    )  # fmt: skip
    alive = [f for f in found if f.changed]
    if not alive:
        return Decomposed(part, size, noise=size.changed)
    values = _together([f.values for f in alive])
    spectrum = _together([np.concatenate([f.values, f.following]) for f in alive])
    # Rounding alone is held by no factors.
    noise = math.fsum(f.size.energy for f in found if f.noise)
    kept = [float((f.values**2).sum()) for f in alive]
    lost = [f.rounding for f in alive if f.rounding is not None]
    rounding = None
    if len(lost) == len(alive) and sum(kept) > 0:
        rounding = math.sqrt(
            math.fsum(k * r**2 for k, r in zip(kept, lost, strict=True)) / sum(kept)
        )
    return Decomposed(
        part, size, values, spectrum[len(values) :], noise + math.fsum(f.cut for f in alive),
        noise + math.fsum(f.least for f in alive), rounding, max(f.passes for f in alive),
    )  # fmt: skip


def _together(values: Sequence[Float64]) -> Float64:
    """Singular values of several matrices, which get their ranks together."""
    squares = np.zeros(max(map(len, values)))
    for own in values:
        squares[: len(own)] += own**2
    return np.sqrt(squares)


def by_unit(parts: Iterable[Counterpart]) -> list[Counterpart]:
    """One of the matrices of each stack, and all other parts."""
    return list({part.unit: part for part in parts}.values())
