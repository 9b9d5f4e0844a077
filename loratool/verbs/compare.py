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

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import check_ranges, note_scales
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.adapters.weighting import PLAIN, Weight
from loratool.answers import Answer
from loratool.combining.alignment import Contribution, explained_overflow, join
from loratool.combining.base_weights import BaseWeights
from loratool.combining.extras import unequal
from loratool.combining.relations import (
    Measured,
    ModuleRelations,
    Relation,
    overall,
    related,
    shares,
    survival,
    verdict,
)
from loratool.errors import UsageError, explained_os_errors
from loratool.linalg.angles import effective_rank
from loratool.linalg.lowrank import Decomposition, decompose
from loratool.notices import Notice
from loratool.paths import selected
from loratool.storage.tensors import FilePool
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.threads import computed, few
from loratool.verbs.inputs import (
    as_list,
    as_texts,
    check_paths,
    check_sizes,
    check_weights,
    model_at,
    told_of,
)

#: Relative difference below which two deltas count as equal: what float16 rounds off is half of it.
TOLERANCE = 1e-3

#: A difference of zero comes out up to a tenth of this: what decompose leaves out as negligible.
_FINEST = 1e-6


@dataclass(repr=False)
class CompareReport(Answer):
    """What `compare` found.

    `verdicts` has a word for each of the `pairs`, in their order: "same", "same-deltas" (but other
    tensors beside them), "scaled" (B is a multiple of A, the same in every module), "near" (2 %
    apart or less), "related", "unrelated", "conflict" or "disjoint". `differing` says what is not
    equal, within `tolerance`, between the first adapter and the others; `differing_beside` is the
    part of it that is no low-rank module. `sum_share` is ‖Σ‖²/Σ‖wᵢΔᵢ‖² of the weighted sum Σ, and
    `survival` what Σ holds of each part (see `ModuleRelations`).
    """

    ROWS = "modules"

    adapters: list[str]
    weights: list[float | str]
    tolerance: float
    modules: list[ModuleRelations]
    pairs: list[Relation]
    verdicts: list[str]
    norms: list[float]
    survival: list[float | None]
    sum_share: float | None
    equal: bool
    differing: list[str]
    differing_beside: list[str]
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


@explained_os_errors()
def compare(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float | str | Weight] | None = None,
    tolerance: float = TOLERANCE,
    base: str | Path | None = None,
    components: str | Sequence[str] = (),
    told: Told | Sequence[Told] = (),
    expert_b_layout: str | None = None,
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
    components: the only parts of the base that the adapters may go into.
    told: what the user says of each adapter, because its file does not; see `merge`.
    expert_b_layout: how lora_B of expert stacks lies where an adapter does not tell; see `merge`.
    layers: only modules of these layers, "3" or "0-5,7". include: only modules whose path, or a
        dotted end of it, matches one of these globs.
    progress: called with (modules done, modules in all, module).

    Raises FileError, AdapterError and ValueRangeError for adapters that cannot be read, MatchError
    for modules of different shapes, UsageError for fewer than two adapters.
    """
    sources = as_list(adapters)
    check_paths([], sources, "loratool compare A B")
    run = Run(threads, progress)
    if len(sources) < 2:
        raise UsageError("One adapter cannot be compared.", "Give two or more.")
    if not _FINEST <= tolerance < 1:
        raise UsageError(
            f"--tolerance {tolerance:g} must lie between {_FINEST:g} and 1.",
            "0.001 lets float16 copies pass, 0.01 bfloat16 copies.",
        )
    factors = check_weights(weights, sources)
    check_sizes(factors)
    said = told_of(told, sources, expert_b_layout)
    model = model_at(base)
    loras = [read_lora(source, own, model) for source, own in zip(sources, said, strict=True)]
    joined = join(loras, [PLAIN] * len(loras), "compared", with_dora=True, with_stacks=True)
    joined.notices += [
        notice
        for lora, factor in zip(loras, factors, strict=True)
        if not factor.is_one
        for notice in note_scales(lora, factor)
    ]
    for lora, factor in zip(loras, factors, strict=True):
        check_ranges(lora, factor)
    paths = selected(list(joined.modules), layers, include)
    targets = BaseWeights(model, loras, as_texts(components)) if model is not None else None
    modules = []
    with FilePool() as files:
        work = (
            partial(
                _compare_module,
                path,
                joined.modules[path],
                [w.at(path) for w in factors],
                files,
                targets,
            )
            for path in paths
        )
        for found in computed(work, few(run.threads) if targets else run.threads):
            modules.append(found)
            if run.progress is not None:
                run.progress(len(modules), len(paths), found.module.path)
    beside: dict[tuple[int, int], list[str]] = {}
    if layers is None and not include:
        for i, j in itertools.combinations(range(len(loras)), 2):
            beside[i, j] = unequal(loras[i], loras[j], tolerance)
    for lora in loras:
        lora.folder.refuse_changed()
    differing_beside = [
        f"{letter(i)}–{letter(j)} {line}"
        for (i, j), lines in beside.items()
        if i == 0
        for line in lines
    ]
    differing = _differing(modules, tolerance) + differing_beside
    pairs = overall(modules, len(loras))
    held, share = survival(modules, factors)
    return CompareReport(
        adapters=[a.label for a in loras],
        weights=[factor.document for factor in factors],
        tolerance=tolerance,
        modules=[m.module for m in modules],
        pairs=pairs,
        verdicts=[verdict(p, modules, tolerance, bool(beside.get((p.a, p.b)))) for p in pairs],
        norms=[math.sqrt(float(sum(m.gram[i, i] for m in modules))) for i in range(len(loras))],
        survival=held,
        sum_share=share,
        equal=not differing,
        differing=differing,
        differing_beside=differing_beside,
        base=None if base is None else str(base),
        warnings=[*joined.notices, *_note_dora(loras), *(targets.notices if targets else [])],
    )


def _compare_module(
    path: str,
    parts: Sequence[Contribution],
    weights: Sequence[float],
    files: FilePool,
    targets: BaseWeights | None,
) -> Measured:
    count = len(weights)
    found: dict[int, Decomposition] = {}
    ranks: list[int | None] = [None] * count
    gram = np.zeros((count, count))
    for part in parts:
        term = part.read(files)
        with explained_overflow(path):
            found[part.index] = decompose(term.b, term.a, part.scale)
        ranks[part.index] = part.module.rank
        gram[part.index, part.index] = found[part.index].energy
    shape = parts[0].module.shape
    pairs = [related(i, j, found, gram, shape) for i, j in itertools.combinations(range(count), 2)]
    counts = None
    if targets is not None:
        plain = {p.index: found[p.index] for p in parts if p.module.adds}
        by_index = targets.intruders(path, plain, files)
        counts = [by_index.get(i) for i in range(count)]
    w = np.asarray(weights)
    module = ModuleRelations(
        path=path,
        kind=parts[0].module.kind,
        shape=shape,
        ranks=ranks,
        norms=[math.sqrt(gram[i, i]) if i in found else None for i in range(count)],
        effective_ranks=[
            effective_rank(found[i].values) if i in found else None for i in range(count)
        ],
        survival=shares(gram, w),
        sum_norm=math.sqrt(max(0.0, float(w @ gram @ w))),
        pairs=pairs,
        intruders=counts,
    )
    return Measured(module, gram)


def _differing(modules: Sequence[Measured], tolerance: float) -> list[str]:
    """Which modules the first adapter and another have differently, in words."""
    found = []
    for m in modules:
        for pair in m.module.pairs:
            if pair.a or pair.distance <= tolerance:
                continue
            names = f"{letter(pair.a)}–{letter(pair.b)}"
            if m.module.ranks[0] is None or m.module.ranks[pair.b] is None:
                only = letter(pair.b if m.module.ranks[0] is None else 0)
                found.append(f"{names} {m.module.path}: only in {only}")
            else:
                found.append(f"{names} {m.module.path}: differ by {pair.distance:.2%}")
    return found


def letter(index: int) -> str:
    """What an adapter is called in words: A, B, … by its place in the command."""
    return chr(ord("A") + index) if index < 26 else f"#{index + 1}"


def _note_dora(adapters: Sequence[Adapter]) -> list[Notice]:
    dora = [a for a in adapters if not all(m.adds for m in a.modules.values())]
    if not dora:
        return []
    text = (
        f"{', '.join(a.label for a in dora)} has DoRA magnitudes: cosines, norms and "
        "overlaps are of scale·B·A alone; the magnitudes only count for equality."
    )
    return [Notice("dora-compared", text)]
