"""How adapters relate, from inner products: in one module, over all, and in a word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratool.adapters.weighting import Weight
from loratool.linalg.angles import angles_and_product
from loratool.linalg.lowrank import Decomposition, Float64

#: Cosines nearer to zero than this say that two deltas have nothing to do with each other.
UNRELATED = 0.05

#: Up to this relative difference two adapters are nearly the same: bfloat16 makes 0.3 %.
NEAR = 0.02


@dataclass
class Relation:
    """How adapter `b` relates to adapter `a` (their places in the command), in a module or overall.

    `cosine` of the deltas, over the modules that both adapt; None where there is none, or where a
    delta is zero. `ratio` is ‖Δb‖/‖Δa‖, and `distance` ‖Δa − Δb‖ over the larger norm. `factor` c
    makes c·Δa nearest to Δb. `output_overlap` and `input_overlap` are the mean squared cosines of
    the principal angles between the column spaces and between the row spaces: 1 if one contains the
    other, 0 if they are orthogonal, and for random spaces about `output_chance`, `input_chance`.
    """

    a: int
    b: int
    cosine: float | None
    ratio: float | None
    distance: float
    factor: float | None
    output_overlap: float | None = None
    input_overlap: float | None = None
    output_chance: float | None = None
    input_chance: float | None = None
    #: Cosines of the principal angles in one module, largest first.
    output_cosines: list[float] | None = None
    input_cosines: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class ModuleRelations:
    """One module in all adapters; lists have an entry per adapter, None where it is not there.

    `effective_ranks` are e^H of the singular values' shares (Roy and Vetterli, 2007). `survival` is
    ⟨Δᵢ, Σ⟩/⟨wᵢΔᵢ, Δᵢ⟩ of the weighted sum Σ: 1 undisturbed, 0 cancelled. `intruders` counts
    singular vectors among the ten largest that the base does not have.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    ranks: list[int | None]
    norms: list[float | None]
    effective_ranks: list[float | None]
    survival: list[float | None]
    sum_norm: float
    pairs: list[Relation]
    intruders: list[int | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        fields = {k: v for k, v in self.__dict__.items() if k != "intruders" or v is not None}
        return {
            **fields,
            "shape": list(self.shape),
            "pairs": [pair.to_dict() for pair in self.pairs],
        }


@dataclass
class Measured:
    """A module with `gram [n, n]`, the inner products of all deltas, 0 where one is absent."""

    module: ModuleRelations
    gram: Float64


def related(
    i: int, j: int, found: dict[int, Decomposition], gram: Float64, shape: tuple[int, int]
) -> Relation:
    """The relation of two adapters in one module; fills their place in `gram`."""
    if i not in found or j not in found:
        return _relation(i, j, gram, shared=False)
    columns, rows, gram[i, j] = angles_and_product(found[i], found[j])
    gram[j, i] = gram[i, j]
    relation = _relation(i, j, gram, shared=True)
    larger = max(len(found[i].values), len(found[j].values))
    if columns.size:
        relation.output_overlap, relation.input_overlap = float(columns.mean()), float(rows.mean())
        relation.output_chance, relation.input_chance = (min(1.0, larger / n) for n in shape)
        relation.output_cosines = [float(x) for x in np.sqrt(columns)]
        relation.input_cosines = [float(x) for x in np.sqrt(rows)]
    return relation


def _relation(i: int, j: int, gram: Float64, shared: bool) -> Relation:
    a, b, ab = float(gram[i, i]), float(gram[j, j]), float(gram[i, j])
    largest, apart = max(a, b), max(0.0, a + b - 2 * ab)
    cosine = None
    if shared and a > 0 and b > 0:
        cosine = max(-1.0, min(1.0, ab / math.sqrt(a) / math.sqrt(b)))
    return Relation(
        i, j, cosine,
        _root_of_quotient(b, a) if a and (shared or b) else None,
        math.sqrt(apart / largest) if largest else 0.0,
        ab / a if a else None,
    )  # fmt: skip


def _root_of_quotient(b: float, a: float) -> float:
    """√(b/a), also where b/a leaves the range of float64."""
    quotient = b / a
    return math.sqrt(quotient) if quotient < math.inf else math.sqrt(b) / math.sqrt(a)


def overall(modules: Sequence[Measured], count: int) -> list[Relation]:
    """The relations over all modules together: the deltas as one long vector each."""
    total = np.sum([m.gram for m in modules], axis=0)
    relations = []
    for number, (i, j) in enumerate(itertools.combinations(range(count), 2)):
        own = [m.module.pairs[number] for m in modules]
        relation = _relation(i, j, total, shared=False)
        common = [m.gram for m in modules if m.module.norms[i] and m.module.norms[j]]
        if common:
            relation.cosine = _relation(i, j, np.sum(common, axis=0), shared=True).cosine
        relation.output_overlap = _mean([p.output_overlap for p in own])
        relation.input_overlap = _mean([p.input_overlap for p in own])
        relation.output_chance = _mean([p.output_chance for p in own])
        relation.input_chance = _mean([p.input_chance for p in own])
        relations.append(relation)
    return relations


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def shares(gram: Float64, weights: Float64) -> list[float | None]:
    """What the weighted sum holds of each of its parts: ⟨Δᵢ, ΣwⱼΔⱼ⟩ / (wᵢ·‖Δᵢ‖²)."""
    return [
        float(gram[i] @ weights / (weights[i] * gram[i, i])) if gram[i, i] and weights[i] else None
        for i in range(len(weights))
    ]


def survival(
    modules: Sequence[Measured], weights: Sequence[Weight]
) -> tuple[list[float | None], float | None]:
    """The shares over all modules, and ‖Σ‖²/Σ‖wᵢΔᵢ‖²; weights may differ by module."""
    factors = [np.asarray([w.at(m.module.path) for w in weights]) for m in modules]
    grams = [np.outer(w, w) * m.gram for w, m in zip(factors, modules, strict=True)]
    total = np.sum(grams, axis=0)
    apart = float(np.trace(total))
    share = max(0.0, float(total.sum())) / apart if apart else None
    return shares(total, np.ones(len(weights))), share


def verdict(
    relation: Relation, modules: Sequence[Measured], tolerance: float, differ_beside: bool
) -> str:
    """A word for a pair: see `CompareReport`."""
    i, j = relation.a, relation.b
    own = [p for m in modules for p in m.module.pairs if (p.a, p.b) == (i, j)]
    farthest = max((p.distance for p in own), default=0.0)
    if farthest <= tolerance:
        return "same-deltas" if differ_beside else "same"
    if relation.cosine is None:
        return "disjoint"
    c = relation.factor or 0.0
    if not differ_beside and all(_is_multiple(m.gram, i, j, c, tolerance) for m in modules):
        return "scaled"
    if farthest <= NEAR:
        return "near"
    if abs(relation.cosine) < UNRELATED:
        return "unrelated"
    return "related" if relation.cosine > 0 else "conflict"


def _is_multiple(gram: Float64, i: int, j: int, c: float, tolerance: float) -> bool:
    """Whether ‖Δb − c·Δa‖ ≤ tolerance·‖Δb‖."""
    a, b, ab = float(gram[i, i]), float(gram[j, j]), float(gram[i, j])
    return b + c * c * a - 2 * c * ab <= tolerance**2 * b + 1e-14 * (b + c * c * a)
