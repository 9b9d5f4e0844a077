"""compare: are adapters the same, related, or in conflict? From Gram matrices of their factors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Notice
from loratool.base_weights import BaseWeights
from loratool.beside import unequal
from loratool.checkpoint.tensors import FilePool
from loratool.errors import UsageError, explained_os_errors
from loratool.formats import read_lora
from loratool.inputs import as_list, check_paths, check_sizes, check_threads, check_weights
from loratool.joining import Part, explained_overflow, join
from loratool.linalg.angles import angles_and_product, effective_rank
from loratool.linalg.lowrank import Decomposition, Float64, decompose
from loratool.output import Progress
from loratool.selection import selected
from loratool.threads import computed

#: Relative difference below which two deltas count as equal: what float16 rounds off is half of it.
TOLERANCE = 1e-3

#: A difference of zero comes out up to a tenth of this: what decompose leaves out as negligible.
_FINEST = 1e-6

#: Cosines nearer to zero than this say that two deltas have nothing to do with each other.
_UNRELATED = 0.05


@dataclass
class Pair:
    """How adapter `b` relates to adapter `a` (their places in the command), in a module or overall.

    `cosine` of the deltas, None where one of them is zero or absent. `ratio` is ‖Δb‖/‖Δa‖.
    `distance` is ‖Δa − Δb‖ over the larger norm. `factor` c makes c·Δa nearest to Δb, and
    `residual` is ‖Δb − c·Δa‖/‖Δb‖. `outputs` and `inputs` are the squared cosines of the principal
    angles between their column spaces (what they write) and row spaces (what they read); overall
    only their means, `output_overlap` and `input_overlap`, are known: 1 if one space contains the
    other, 0 if they are orthogonal.
    """

    a: int
    b: int
    cosine: float | None
    ratio: float | None
    distance: float
    factor: float | None
    residual: float | None
    output_overlap: float | None
    input_overlap: float | None
    outputs: list[float] | None = None
    inputs: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v is not None or k[-3:] != "uts"}


@dataclass
class ModuleComparison:
    """One module in all adapters; lists have an entry per adapter, None where it is not there.

    `effective_ranks` are e^H of the singular values' shares (Roy and Vetterli, 2007). `survival` is
    ⟨Δᵢ, Σ⟩/⟨Δᵢ, Δᵢ⟩ of the weighted sum Σ, over the weight: 1 undisturbed, 0 cancelled. `intruders`
    counts singular vectors among the ten largest that the base does not have.
    """

    path: str
    kind: str
    ranks: list[int | None]
    norms: list[float | None]
    effective_ranks: list[float | None]
    survival: list[float | None]
    sum_norm: float
    pairs: list[Pair]
    intruders: list[int | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        fields = {k: v for k, v in self.__dict__.items() if k != "intruders" or v is not None}
        return {**fields, "pairs": [p.to_dict() for p in self.pairs]}


@dataclass
class CompareReport:
    """What `compare` found. `verdicts` has a word for each pair, in the order of `pairs`: "same",
    "same-deltas" (but other tensors beside them), "scaled", "related", "unrelated", "conflict" or
    "disjoint". `differing` says what is not equal,
    within `tolerance`, between the first adapter and the others. `sum_share` is ‖Σ‖²/Σ‖wᵢΔᵢ‖²."""

    adapters: list[str]
    weights: list[float]
    tolerance: float
    modules: list[ModuleComparison]
    pairs: list[Pair]
    verdicts: list[str]
    norms: list[float]
    survival: list[float | None]
    sum_share: float | None
    equal: bool
    differing: list[str]
    base: str | None = None
    warnings: list[Notice] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        fields = {k: v for k, v in self.__dict__.items() if k not in ("modules", "warnings")}
        return {
            "schema_version": 1,
            **fields,
            "pairs": [p.to_dict() for p in self.pairs],
            "modules": [m.to_dict() for m in self.modules],
            "warnings": [w.to_dict() for w in self.warnings],
        }


def compare(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
    base: str | Path | None = None,
    layers: str | None = None,
    include: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Compare what two or more LoRA adapters do to the weights of one base model.

    Parameters
    ----------
    adapters: PEFT adapter directories or files; factors, ranks, scales and dtypes may differ.
    weights: what they would be combined with, for `survival`; 1.0 each if not given.
    tolerance: relative difference up to which two deltas count as equal.
    base: base model; counts intruder dimensions, which takes an eigendecomposition per module.
    layers: only modules of these layers, "3" or "0-5,7". include: only modules whose path, or a
        dotted end of it, matches one of these globs.
    progress: called with (modules done, modules in all, module).

    Raises FileError, AdapterError and ValueRangeError for adapters that cannot be read, MatchError
    for modules of different shapes, UsageError for fewer than two adapters.
    """
    sources = as_list(adapters)
    check_paths([], sources, "loratool compare A B")
    check_threads(threads)
    if len(sources) < 2:
        raise UsageError("One adapter cannot be compared.", "Give two or more.")
    if not _FINEST <= tolerance < 1:
        raise UsageError(
            f"--tolerance {tolerance:g} must lie between {_FINEST:g} and 1.",
            "0.001 lets float16 copies pass, 0.01 bfloat16 copies.",
        )
    factors = check_weights(weights, sources)
    check_sizes(factors)
    with explained_os_errors():
        loras = [read_lora(source) for source in sources]
        joined = join(loras, [1.0] * len(loras), "compared", with_dora=True)
        paths = selected(list(joined.modules), layers, include)
        targets = BaseWeights(base, loras) if base is not None else None
        modules = []
        with FilePool() as files:
            work = (
                partial(_compare_module, path, joined.modules[path], factors, files, targets)
                for path in paths
            )
            for found in computed(work, threads):
                modules.append(found)
                if progress is not None:
                    progress(len(modules), len(paths), found.module.path)
        differing = [
            f"{m.module.path}: differs by {pair.distance:.2g} of its norm"
            for m in modules
            for pair in m.module.pairs
            if pair.a == 0 and pair.distance > tolerance
        ]
        beside: dict[tuple[int, int], list[str]] = {}
        if layers is None and not include:
            for i, j in itertools.combinations(range(len(loras)), 2):
                beside[i, j] = unequal(loras[i], loras[j], tolerance)
                differing += beside[i, j] if i == 0 else []
    pairs = _overall(modules, len(loras))
    survival, share = _survival(modules, factors)
    return CompareReport(
        adapters=[str(a.source) for a in loras],
        weights=factors,
        tolerance=tolerance,
        modules=[m.module for m in modules],
        pairs=pairs,
        verdicts=[_verdict(p, modules, tolerance, bool(beside.get((p.a, p.b)))) for p in pairs],
        norms=[math.sqrt(float(sum(m.gram[i, i] for m in modules))) for i in range(len(loras))],
        survival=survival,
        sum_share=share,
        equal=not differing,
        differing=differing,
        base=None if base is None else str(base),
        warnings=[*joined.notices, *(targets.notices if targets else [])],
    )


@dataclass
class _Measured:
    """A module with `gram [n, n]`, the inner products of all deltas, 0 where one is absent."""

    module: ModuleComparison
    gram: Float64


def _compare_module(
    path: str,
    parts: Sequence[Part],
    weights: Sequence[float],
    files: FilePool,
    targets: BaseWeights | None,
) -> _Measured:
    count = len(weights)
    found: dict[int, Decomposition] = {}
    ranks: list[int | None] = [None] * count
    for part in parts:
        term = part.read(files)
        with explained_overflow(path):
            found[part.index] = decompose(term.b, term.a, part.scale)
        ranks[part.index] = part.module.rank
    gram = np.zeros((count, count))
    for i, own in found.items():
        gram[i, i] = own.energy
    pairs = []
    for i, j in itertools.combinations(range(count), 2):
        spaces = None
        if i in found and j in found:
            spaces = angles_and_product(found[i], found[j])

            gram[i, j] = gram[j, i] = spaces[2]
        pairs.append(_pair(i, j, gram, spaces))
    w = np.asarray(weights)
    effective = [effective_rank(found[i].values) if i in found else None for i in range(count)]
    counts = None
    if targets is not None:
        by_index = targets.intruders(path, found, files)
        counts = [by_index.get(i) for i in range(count)]
    module = ModuleComparison(
        path=path,
        kind=parts[0].module.kind,
        ranks=ranks,
        norms=[math.sqrt(gram[i, i]) if i in found else None for i in range(count)],
        effective_ranks=effective,
        survival=_shares(gram, w),
        sum_norm=math.sqrt(max(0.0, float(w @ gram @ w))),
        pairs=pairs,
        intruders=counts,
    )
    return _Measured(module, gram)


def _shares(gram: Float64, weights: Float64) -> list[float | None]:
    """How much of each delta its place in the weighted sum leaves: ⟨Δᵢ, ΣwⱼΔⱼ⟩ / (wᵢ·‖Δᵢ‖²)."""
    return [
        float(gram[i] @ weights / (weights[i] * gram[i, i])) if gram[i, i] and weights[i] else None
        for i in range(len(weights))
    ]


def _pair(i: int, j: int, gram: Float64, spaces: tuple[Float64, Float64, float] | None) -> Pair:
    a, b, ab = float(gram[i, i]), float(gram[j, j]), float(gram[i, j])
    largest = max(a, b)
    apart = max(0.0, a + b - 2 * ab)
    both = a > 0 and b > 0
    outputs, inputs = (spaces[0], spaces[1]) if spaces else (np.zeros(0), np.zeros(0))
    cosine = max(-1.0, min(1.0, ab / math.sqrt(a) / math.sqrt(b))) if both else None
    return Pair(
        i, j,
        cosine,
        math.sqrt(b / a) if a else None,
        math.sqrt(apart / largest) if largest else 0.0,
        ab / a if a else None,
        math.sqrt(max(0.0, 1 - cosine**2)) if cosine is not None else None,
        float(outputs.mean()) if outputs.size else None,
        float(inputs.mean()) if inputs.size else None,
        [float(x) for x in outputs] if outputs.size else None,
        [float(x) for x in inputs] if inputs.size else None,
    )  # fmt: skip


def _overall(modules: Sequence[_Measured], count: int) -> list[Pair]:
    """The pairs over all modules together: the deltas as one long vector each."""
    total = np.sum([m.gram for m in modules], axis=0)
    pairs = []
    for number, (i, j) in enumerate(itertools.combinations(range(count), 2)):
        pair = _pair(i, j, total, None)
        own = [m.module.pairs[number] for m in modules]
        pair.output_overlap = _mean([x for p in own for x in p.outputs or []])
        pair.input_overlap = _mean([x for p in own for x in p.inputs or []])
        pairs.append(pair)
    return pairs


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _survival(
    modules: Sequence[_Measured], weights: Sequence[float]
) -> tuple[list[float | None], float | None]:
    total = np.sum([m.gram for m in modules], axis=0)
    w = np.asarray(weights)
    apart = float(np.sum(w**2 * np.diagonal(total)))
    return _shares(total, w), float(w @ total @ w) / apart if apart else None


def _verdict(
    pair: Pair, modules: Sequence[_Measured], tolerance: float, differ_beside: bool
) -> str:
    own = [p for m in modules for p in m.module.pairs if (p.a, p.b) == (pair.a, pair.b)]
    if all(p.distance <= tolerance for p in own):
        return "same-deltas" if differ_beside else "same"
    if all(p.cosine is None for p in own):
        return "disjoint"
    if pair.cosine is None or pair.residual is None:
        return "disjoint"
    if pair.residual <= tolerance:
        return "scaled"
    if abs(pair.cosine) < _UNRELATED:
        return "unrelated"
    return "related" if pair.cosine > 0 else "conflict"
