"""What an audit knows of one module: its spectrum, and the ranks that would hold it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loratool.adapters.factors import Factors
from loratool.adapters.norms import DeltaNorms
from loratool.linalg.lowrank import NEGLIGIBLE, Float64
from loratool.linalg.noise import NoEdge, NoiseEdge, noise_edge
from loratool.linalg.ranks import Criterion

_ELSEWHERE = {"singular_values"}

#: The share of ‖ΔW‖² that a rank must hold to be enough.
ENOUGH = 0.99


@dataclass
class ModuleAudit:
    """One module. What is None could not be computed, or means nothing for it.

    `norm` is ‖ΔW‖ and `singular_values` are those of ΔW; without a known scale they are those of
    B·A, and `norm` is None. `effective_rank` is exp of the entropy of σ/Σσ (Roy, Vetterli, 2007),
    `rank_used` counts the values that are not zero beside the first, `rank_enough` is the smallest
    rank with 99 % of ‖ΔW‖², and `above_noise` counts the values above `noise_edge` (see
    `linalg.noise`), which hold `noise_kept` of ‖ΔW‖²; `no_edge` says why there is none.
    `first_share` is σ₁²/‖ΔW‖², `gap` σ₁/σ₂.

    Of a stack of experts the ranks are the largest of any expert, because they share one, the other
    figures medians, `norm` that of all together and `singular_values` the means.
    """

    path: str
    algorithm: str
    rank: int
    shape: tuple[int, int]
    scale: float | None
    adds: bool
    #: "" or why it has no effect: "A is zero", "B is zero", "the scale is 0".
    dead: str = ""
    #: Experts of a stack that have no effect.
    dead_experts: int = 0
    finite: bool = True
    measured: bool = False
    norm: float | None = None
    singular_values: list[float] = field(default_factory=list)
    effective_rank: float | None = None
    rank_used: int | None = None
    rank_enough: int | None = None
    above_noise: int | None = None
    noise_edge: float | None = None
    noise_kept: float | None = None
    no_edge: NoEdge = ""
    first_share: float | None = None
    gap: float | None = None
    #: ‖ΔW‖/‖W‖, with a base.
    relative_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures; inspect's own report of the module has the singular values."""
        figures = {name: value for name, value in self.__dict__.items() if name not in _ELSEWHERE}
        return {**figures, "shape": list(self.shape)}


def audited(
    module: Factors, path: str, norms: DeltaNorms | None, relative: float | None
) -> ModuleAudit:
    """The figures of one module; `norms` are None where it has no pair of factors."""
    audit = ModuleAudit(
        path, module.algorithm, module.rank, module.shape, module.scale, module.adds,
        relative_norm=relative,
    )  # fmt: skip
    if norms is None:
        return audit
    audit.finite, audit.measured = norms.finite, norms.finite
    if not norms.finite:
        return audit
    audit.dead_experts = norms.dead if len(norms.zero_a) > 1 else 0
    more = module.bias is not None or module.magnitude is not None  # what has an effect without ΔW
    if norms.idle and not more:
        audit.dead = f"{norms.idle} is zero"
    elif module.scale == 0 and not more:
        audit.dead = "the scale is 0"
    if norms.values is not None:
        audit.norm = math.sqrt(float(np.sum(norms.values**2)))
    values = norms.unscaled if norms.values is None else norms.values
    alive = [own for own in values if own[0] > 0]
    if alive:
        _describe_spectra(audit, values, alive)
    elif not (audit.dead or more):
        audit.dead = "B·A is zero"
    return audit


def _describe_spectra(audit: ModuleAudit, values: Float64, alive: list[Float64]) -> None:
    energies = [float(np.sum(own**2)) for own in alive]
    audit.singular_values = [float(v) for v in values.mean(axis=0)]
    audit.effective_rank = statistics.median(map(_effective_rank, alive))
    audit.rank_used = max(int(np.count_nonzero(v > NEGLIGIBLE * v[0])) for v in alive)
    enough = Criterion(energy=ENOUGH)
    audit.rank_enough = max(enough.choose(v, e) for v, e in zip(alive, energies, strict=True))
    audit.first_share = statistics.median(
        float(v[0] ** 2) / e for v, e in zip(alive, energies, strict=True)
    )
    if values.shape[1] > 1:
        audit.gap = statistics.median(float(v[0] / max(v[1], NEGLIGIBLE * v[0])) for v in alive)
    edges = [noise_edge(own, *audit.shape) for own in alive]
    _describe_noise(audit, alive, energies, edges)


def _describe_noise(
    audit: ModuleAudit, alive: list[Float64], energies: list[float], edges: list[NoiseEdge]
) -> None:
    without = next((edge.why for edge in edges if edge.edge is None), None)
    if without is not None:
        audit.no_edge = without
        return
    audit.above_noise = max(edge.above for edge in edges)
    audit.noise_edge = statistics.median(edge.edge or 0.0 for edge in edges)
    kept = sum(float(np.sum(own[: audit.above_noise] ** 2)) for own in alive)
    audit.noise_kept = kept / sum(energies)


def _effective_rank(values: Float64) -> float:
    shares = values[values > 0] / float(values.sum())
    return math.exp(-float(np.sum(shares * np.log(shares))))
