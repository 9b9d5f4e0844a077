"""What rounding did to values, counted; and values that can tell it of themselves."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from loratool.storage.tensors import Bytes
from loratool.storage.values import Values


@dataclass(frozen=True)
class KeptOfDelta:
    """What is left of Δ where weights are quantised again: `share` is ⟨realised, Δ⟩/⟨Δ, Δ⟩, and
    `error` is ‖realised − Δ‖/‖Δ‖."""

    share: float
    error: float

    def to_dict(self) -> dict[str, float]:
        """For JSON, in digits that do not depend on the order of sums."""
        return {"share": round(self.share, 4), "error": round(self.error, 4)}


@dataclass
class Counts:
    """What rounding did: values made subnormal, and nonzero ones made zero.

    `lost` and `delta` are ‖rounded - x‖² and ‖Δ‖² over a sample of the adapted blocks. Of those
    that are quantised again among them, `missed` and `again` are the same, `kept` is the scalar
    product of Δ and what was realised of it.
    """

    subnormal: int = 0
    zeroed: int = 0
    lost: float = 0.0
    delta: float = 0.0
    missed: float = 0.0
    again: float = 0.0
    kept: float = 0.0

    def __iadd__(self, other: Counts) -> Counts:
        self.subnormal += other.subnormal
        self.zeroed += other.zeroed
        self.lost += other.lost
        self.delta += other.delta
        self.missed += other.missed
        self.again += other.again
        self.kept += other.kept
        return self

    @property
    def share_lost(self) -> float | None:
        """‖realised - Δ‖/‖Δ‖: how much of the delta rounding took; None where squares leave the
        range of float64."""
        known = 0 < self.delta < math.inf and self.lost < math.inf
        return math.sqrt(self.lost / self.delta) if known else None

    @property
    def kept_of_delta(self) -> KeptOfDelta | None:
        """What quantising again left of the delta; None where that is not known."""
        if not (0 < self.again < math.inf and self.missed < math.inf):
            return None
        return KeptOfDelta(self.kept / self.again, math.sqrt(self.missed / self.again))


class MeasuredValues(Values):
    """Values that are rounded on the way, more coarsely than a dtype rounds."""

    @abstractmethod
    def read_measured(self, low: int, high: int, raw: Bytes, counts: Counts) -> None:
        """Fill `raw` as `read_into` does, and count what rounding took."""
