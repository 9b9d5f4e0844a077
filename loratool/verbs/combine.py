"""combine: several adapters as one, by a method of choice, from their factors alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapters.effect import note_slips
from loratool.adapters.picking import picked, refuse_half_companions
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.answers import Answer
from loratool.combining.alignment import Contribution, Joined, explained_overflow, join
from loratool.combining.extras import settle
from loratool.combining.options import CombineOptions
from loratool.combining.output import output_dtype, write_adapter
from loratool.combining.rank_change import ModuleChange, NewFactors, RankPolicy, shrink
from loratool.dtypes import dtype_name
from loratool.errors import UsageError, explained_os_errors
from loratool.linalg.chance import Spectrum
from loratool.linalg.lowrank import Factor, Float64, crossed, decompose, inner, stacked
from loratool.linalg.methods import Combined, Method, Settings, Term
from loratool.linalg.ranks import Criterion
from loratool.notices import Notice, document
from loratool.paths import Choice
from loratool.storage.destination import Overwrite, check_output, refuse_company
from loratool.storage.tensors import FilePool
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.threads import few
from loratool.verbs.inputs import (
    as_list,
    as_texts,
    check_paths,
    check_sizes,
    check_weights,
    model_at,
    told_of,
)

_ANY_RANK = 1 << 30

#: A result below this share of the adapters' norms is what float64 leaves of weights that cancel:
#: float32 factors that differ in one value differ by more.
_NOTHING = 1e-13

#: A result that is zero is blamed on pruning below this density, on the weights above it.
_SPARSE = 0.01


@dataclass(repr=False)
class CombineReport(Answer):
    """What was combined. `kept` is the share of ‖ΔW‖² left by the cut to `rank`, `error` the
    relative error ‖cut off‖/‖ΔW‖, `from_sum` ‖result − Σ‖/‖Σ‖ for methods that are no sum, and
    `rounding` what half precision adds (None for float32), over all modules together."""

    ROWS = "modules"

    adapters: list[str]
    weights: list[float | str]
    method: str
    options: dict[str, Any]
    output: str
    dtype: str
    dry_run: bool
    rank: int
    modules: list[ModuleChange]
    kept: float | None
    error: float
    from_sum: float | None
    rounding: float | None
    saved: list[str]
    bytes_written: int
    warnings: list[Notice] = field(default_factory=list)
    #: What --include and --exclude left out of each adapter, in their order.
    excluded: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self, "modules", "warnings")


@explained_os_errors()
def combine(
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float | str | Weight] | None = None,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    saved: str = "refuse",
    keep_patterns: bool = False,
    told: Told | Sequence[Told] = (),
    base: str | Path | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    dtype: str | None = None,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CombineReport:
    """Combine LoRA adapters of one base model into one PEFT adapter directory.

    Parameters
    ----------
    adapters: PEFT adapter directories or files. Their ranks, scales, targets and dtypes may differ;
        a module that only some have is combined from those.
    output: directory to make; it appears complete or not at all.
    weights: one factor per adapter, of any sign and size; 1.0 each if not given. A text gives
        layers factors of their own, see `merge`. An adapter with weight 0 is left out.
    method: a name in `loratool.linalg.methods.METHODS`; "sum" is `Σ weight·scale·B·A` exactly.
    rank: cut every module to this rank, which is optimal. energy: cut to the smallest rank that
        keeps this share of ‖ΔW‖² in every module.
    density: share of values that pruning methods keep, above 0 and at most 1.
    majority_sign_method: "total" or "frequency", how TIES elects a sign.
    seed: of the random numbers of DARE; with it, module and adapter they are fixed.
    saved: "first", "last" or "mean" where adapters hold the same tensor whole with different
        values; "refuse" otherwise.
    keep_patterns: write each module with its own rank; otherwise all have the largest.
    told: what the user says of each adapter, because its file does not; see `merge`. base: the base
        model, where row orders or products depend on it.
    include, exclude: globs; combine only these parts of the adapters, or leave these out; see
        `merge`.
    dtype: "float16", "bfloat16" or "float32"; the inputs' own if not given.
    threads: worker threads; the result does not depend on it.
    progress: called with (modules done, modules in all, module).

    Raises
    ------
    UsageError: options that contradict each other or the adapters.
    FileError, AdapterError, MatchError: inputs that cannot be combined as asked.
    ValueRangeError: NaN, infinity, overflow, or a result that is zero.
    OutputError: the output cannot be written.
    """
    started = time.perf_counter()
    sources = as_list(adapters)
    check_paths([output], sources, "loratool combine ADAPTER ADAPTER -o OUT")
    run = Run(threads, progress, overwrite, dry_run)
    factors = check_weights(weights, sources)
    check_sizes(factors)
    options = CombineOptions(
        method=method, rank=rank, energy=energy, density=density,
        majority_sign_method=majority_sign_method, seed=seed, saved=saved,
        keep_patterns=keep_patterns, dtype=dtype,
    )  # fmt: skip
    how, criterion = options.check(), options.criterion
    target = Path(output)
    check_output(target, [Path(s) for s in sources], overwrite)
    refuse_other_run(target)
    said = told_of(told, sources)
    model = model_at(base)
    whole = [read_lora(source, own, model) for source, own in zip(sources, said, strict=True)]
    choice = Choice(tuple(as_texts(include)), tuple(as_texts(exclude)))
    loras = picked(whole, choice)
    refuse_half_companions(whole, loras)
    check_output(target, [path.resolve() for a in loras for path in a.files], overwrite)
    refuse_company(target, (), overwrite)
    if not any(factors):
        raise UsageError("All weights are 0: nothing would be left.", "Give another weight.")
    joined = join(loras, factors, "combined")
    settle(joined, saved)
    joined.notices += note_slips(loras, factors)
    code = output_dtype(joined, dtype)
    options = replace(options, dtype=dtype_name(code))
    if how.cuts and not criterion.given:
        criterion = Criterion(rank=_largest_rank(joined))
    settings = Settings(
        "", criterion.rank or _ANY_RANK, density or 1.0, majority_sign_method, seed, criterion
    )
    recipe = _Recipe(how, settings, criterion, uniform=not keep_patterns)
    asked = {**options.to_dict(), **choice.to_dict()}
    with FilePool() as files:
        work = (
            partial(recipe.combine, path, parts, files) for path, parts in joined.modules.items()
        )
        done, nbytes = write_adapter(
            joined, work, target, code,
            {"command": "combine", "options": asked}, RankPolicy(recipe.uniform),
            replace(run, threads=few(threads)) if how.is_dense else run,
            _why_zero(how, settings.density),
        )  # fmt: skip
    notices = [*joined.notices, *done.notices]
    if rank is not None and done.rank < rank:
        text = f"The result has rank {done.rank}, less than the {rank} asked for; nothing was cut."
        notices.append(Notice("rank-not-reached", text))
    return CombineReport(
        adapters=[a.label for a in loras],
        weights=[factor.document for factor in factors],
        method=method,
        options=asked,
        output=str(target),
        dtype=dtype_name(code),
        dry_run=dry_run,
        rank=done.rank,
        modules=done.modules,
        kept=done.kept,
        error=done.error,
        from_sum=done.from_sum,
        rounding=done.rounding,
        saved=[*joined.saved, *joined.token_rows],
        bytes_written=nbytes,
        warnings=notices,
        excluded=[list(adapter.left_out) for adapter in loras],
        seconds=time.perf_counter() - started,
    )


def _why_zero(method: Method, density: float) -> tuple[str, str]:
    if method.prunes and density < _SPARSE:
        return "because pruning left nothing", "Give a larger --density."
    return "because the weights cancel", "`loratool compare` shows how near the adapters are."


def _largest_rank(joined: Joined) -> int:
    return max(m.rank for adapter in joined.used for m in adapter.modules.values())


@dataclass(frozen=True)
class _Recipe:
    """How every module is combined. With `uniform` all get one rank in the end."""

    method: Method
    settings: Settings
    criterion: Criterion
    uniform: bool

    def combine(self, path: str, parts: list[Contribution], files: FilePool) -> NewFactors:
        with explained_overflow(path):
            return self._combine(path, parts, [part.read(files) for part in parts])

    def _combine(self, path: str, parts: list[Contribution], terms: list[Term]) -> NewFactors:
        method = self.method
        alive = [t for t in terms if t.scale and t.b.any() and t.a.any()]
        if not alive:
            nothing = np.zeros((terms[0].b.shape[0], 0)), np.zeros((0, terms[0].a.shape[1]))
            return NewFactors(path, parts, *nothing, np.zeros(0), 0.0, 1)
        # The factor methods count an A whose B is zero, as PEFT does.
        used = terms if method.keeps_factors else alive
        combined = method(used, replace(self.settings, path=path))
        if method.keeps_factors and not self.criterion.given:
            result = _as_they_are(path, parts, combined)
        else:
            # Columns beyond the rank of this module may fit into that of the largest.
            whole = self.uniform and self.criterion.rank is None and not method.selects
            criterion = Criterion() if method.selects else self.criterion
            result = shrink(
                path, parts, combined.b, combined.a, 1.0, criterion, whole, combined.energy
            )
        result = replace(result, alive=frozenset(t.index for t in alive), share=combined.share)
        if not method.exact_sum:
            result = replace(result, sum_parts=_against_sum(result.b, result.a, alive))
        return self._doubted(result, combined, alive)

    def _doubted(self, result: NewFactors, combined: Combined, alive: Sequence[Term]) -> NewFactors:
        """The result with what is doubtful about it; zero where it is only noise of float64."""
        size = sum(
            abs(t.weight * t.scale) * math.sqrt(inner((t.b, t.a), (t.b, t.a))) for t in alive
        )
        if result.sum_parts is not None and 0 < result.energy <= (_NOTHING * size) ** 2:
            return replace(
                result, b=result.b[:, :0], a=result.a[:0], squares=np.zeros(0), energy=0.0, rank=1
            )
        rounding = max(t.rounding for t in alive)
        sum_energy = result.energy if result.sum_parts is None else result.sum_parts[1]
        spectrum = Spectrum(combined.spectrum, rounding) if combined.spectrum is not None else None
        doubts = replace(
            result.doubts,
            spectrum=spectrum or result.doubts.spectrum,
            tied=combined.tied,
            elects=self.method.rule.elect,
            turns=any(Spectrum(values, rounding).has_equals for values in combined.basis),
            total=math.sqrt(max(0.0, sum_energy)),
            size=size if len(alive) > 1 else 0.0,
            rounding=rounding,
        )
        return replace(result, doubts=doubts)


def _as_they_are(path: str, parts: list[Contribution], combined: Combined) -> NewFactors:
    """Factors that are the answer themselves, neither cut nor balanced."""
    found = decompose(combined.b, combined.a)
    rank = combined.a.shape[0]
    squares = np.zeros(rank)
    squares[: len(found.values)] = found.values**2
    energy = float(squares.sum())
    return NewFactors(path, parts, combined.b, combined.a, squares, energy, rank)


def _against_sum(b: Factor, a: Factor, terms: Sequence[Term]) -> tuple[Float64, float]:
    """⟨bₖaₖ, Σ⟩ for each column k, and ‖Σ‖², of the weighted sum Σ = Σ wᵢsᵢBᵢAᵢ."""
    sum_b, sum_a = stacked([(t.b, t.a.astype(np.float64) * (t.weight * t.scale)) for t in terms])
    products = np.sum(crossed(b, sum_b) * crossed(a.T, sum_a.T), axis=1)
    return products, inner((sum_b, sum_a), (sum_b, sum_a))
