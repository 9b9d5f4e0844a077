"""extract: a low-rank adapter from a fine-tuned model minus its base."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.adapter import Notice
from loratool.adapter_output import DTYPES
from loratool.changes import document
from loratool.checkpoint.base import Checkpoint, open_checkpoint, refuse_quantised
from loratool.checkpoint.tensors import FilePool
from loratool.checkpoint.writer import check_output
from loratool.counterparts import Choice, pair
from loratool.errors import UsageError, explained_os_errors, unknown
from loratool.inputs import check_paths, check_threads, parse_bytes
from loratool.linalg.ranks import Criterion
from loratool.output import Progress, counting
from loratool.selection import GROUPS
from loratool.threads import few

if TYPE_CHECKING:
    from loratool.extracted_output import Held
    from loratool.extraction import Found


@dataclass(frozen=True)
class ExtractedModule:
    """One module whose difference became factors, or would.

    `shape` is `(out, in)`. `norm` is ‖Δ‖ and `relative` ‖Δ‖/‖W‖. `kept` is the share of ‖Δ‖² in
    the factors, `error` ‖Δ - B·A‖/‖Δ‖, and no factors of this rank have an error below
    `best_error`. `noise` is ‖·‖ of what storing the tuned weights rounded off, over ‖Δ‖, and
    `rounding` what the factors' dtype adds to the error. `stable_rank` is ‖Δ‖²/σ₁². A dry run
    knows neither `rank` nor what depends on it.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    norm: float
    relative: float | None
    noise: float
    rank: int | None = None
    kept: float | None = None
    error: float | None = None
    best_error: float | None = None
    rounding: float | None = None
    stable_rank: float | None = None
    singular_values: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape)}


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that changed and is no pair of factors: saved whole, or left out."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    norm: float | None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape)}


@dataclass
class ExtractReport:
    """What the adapter holds of the fine-tune.

    `held` is the share of ‖tuned - base‖² over all tensors that both models have, in factors or
    whole; `error` is √(1 - held), and no adapter of these ranks is below `best_error`. `noise` is
    what storing the tuned weights rounded off, over ‖tuned - base‖, and `rounding` what the
    factors' dtype adds. `verified` is the error of base + adapter as read back. `proposals` are the
    sizes of the file by rank, of a dry run; `held_by_rank` is what one rank for all would hold.
    """

    base: str
    tuned: str
    output: str
    dtype: str
    dry_run: bool
    rank: int | None
    uniform: bool
    modules: list[ExtractedModule]
    saved: list[OtherTensor]
    left: list[OtherTensor]
    unchanged: int
    norm: float
    held: float | None
    error: float | None
    best_error: float | None
    noise: float
    rounding: float | None
    bytes_tuned: int
    bytes_written: int
    proposals: dict[int, int] = field(default_factory=dict)
    held_by_rank: dict[int, float] = field(default_factory=dict)
    verified: float | None = None
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        others = {name: [t.to_dict() for t in getattr(self, name)] for name in ("saved", "left")}
        return {**document(self), **others}


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip: Sequence[str] = (),
    save: Sequence[str] = (),
    dtype: str = "float16",
    base_name: str | None = None,
    exact: bool = False,
    seed: int = 0,
    verify: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Make a PEFT adapter of the difference between a fine-tuned model and its base.

    Every tensor is read once (twice with `verify`), its difference taken in float32 and cut to its
    largest singular values (Eckart and Young, 1936), by a randomised method whose distance from the
    best is bounded. One of `rank`, `energy` and `budget` is needed, but for a dry run.

    Parameters
    ----------
    base, tuned: model directories or weights files, in any dtypes and any split into shards.
    output: directory to make; it appears complete or not at all. None only for a dry run.
    rank: this rank for every module. energy: per module the smallest rank with this share of
        ‖Δ‖². budget: bytes of the weights file ("50MB"), spread over the modules so that the total
        error is smallest. max_rank: no module gets more.
    uniform: one rank for all modules, the largest that energy asks for or that the budget allows.
    include, exclude: globs on module paths; what is not chosen is left out, and said so.
    skip: groups that are left out: "norms", "biases", "embeddings", "convs", "heads", "others".
    save: globs on module paths that are saved whole instead of as factors.
    dtype: of the factors. Tensors saved whole keep their own.
    base_name: base_model_name_or_path of the config; by default the name of the base.
    exact: full decompositions. seed: of the randomised ones; equal seeds give equal bytes.
    verify: read the adapter back and measure base + adapter against the tuned model.
    device: "cpu", or "cuda" for the algebra.
    dry_run: measure how much changed, and decompose nothing.
    progress: called with (bytes done, bytes in all, tensor).

    Raises
    ------
    UsageError: options that contradict each other. FileError, BaseError: a model that cannot be
    read. MatchError: the two are no base and fine-tune. ValueRangeError: NaN, infinity, or nothing
    changed. OutputError. VerifyError.
    """
    started = time.perf_counter()
    check_paths([base, tuned], [tuned], "loratool extract BASE TUNED --rank 8 -o OUT")
    if not (dry_run or output):
        raise UsageError("No output given.", "Say where to write: -o OUT.")
    check_threads(threads)
    criterion = Criterion(rank=rank, energy=energy, max_rank=max_rank)
    criterion.check()
    limit = None if budget is None else parse_bytes(budget)
    _check_options(criterion, limit, dtype, skip, dry_run)
    target = Path(output) if output else None
    with explained_os_errors():
        if target is not None:
            check_output(target, [Path(base), Path(tuned)], overwrite)
        before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_same(before, after)
    if target is not None:
        check_output(target, [p.resolve() for p in (*before.files, *after.files)], overwrite)
    refuse_quantised(before, "base", _QUANTISED)
    refuse_quantised(after, "tuned model", _QUANTISED)
    pairs = pair(before, after, Choice(include, exclude, skip, save))
    pairs.notices += _note_swapped(before, after)

    from loratool.extracted_output import gather, propose, write  # torch: two seconds to import
    from loratool.extraction import Extraction, as_device
    from loratool.workers import Workers

    total = sum(part.nbytes for part in pairs.found)
    if verify and not dry_run:
        total += sum(part.tuned.nbytes for part in pairs.found)
    advance = counting(progress, total)
    options = {
        "rank": rank, "energy": energy, "budget": limit, "max_rank": max_rank,
        "uniform": uniform, "include": list(include), "exclude": list(exclude),
        "skip": list(skip), "save": list(save), "dtype": dtype, "exact": exact,
        "seed": seed,
    }  # fmt: skip
    where = as_device(device)
    # Full decompositions hold several dense matrices, and a GPU's memory is one.
    count = few(threads) if exact or where.type == "cuda" else threads
    proposals: dict[int, int] = {}
    with explained_os_errors(), FilePool() as files, Workers(count) as workers:
        work = Extraction(files, workers, DTYPES[dtype], where, seed, exact, advance)
        if dry_run or target is None:
            held = gather(pairs, work.measure(pairs.found))
            proposals = propose(held, pairs, work.dtype, options)
        else:
            held = write(
                before, after, pairs, work, target, options,
                base_name=base_name or _published_name(before), overwrite=overwrite,
                verify=verify, threads=threads,
            )  # fmt: skip
    report = _report(before, after, held, target, dtype, dry_run, uniform)
    report.proposals = proposals
    report.seconds = time.perf_counter() - started
    return report


_QUANTISED = "Both models must hold plain floating-point weights."


def _check_options(
    criterion: Criterion,
    budget: int | None,
    dtype: str,
    skip: Sequence[str],
    dry_run: bool,
) -> None:
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    for group in skip:
        if group not in GROUPS:
            raise unknown("group", group, GROUPS)
    given = [*criterion.given, *(["budget"] if budget is not None else [])]
    if len(given) > 1:
        raise UsageError(
            f"--{given[0]} and --{given[1]} ask for different ranks.", "Give one of them."
        )
    if not given and not dry_run:
        raise UsageError(
            "No rank given.",
            "Say how much to hold: --rank 16, --energy 0.9 or --budget 50MB; --dry-run shows how "
            "much changed.",
        )
    if criterion.max_rank is not None and (not given or given == ["rank"]):
        raise UsageError(
            "--max-rank goes with --energy or --budget.", "Give one of them, or --rank."
        )
    if budget is not None and budget < 1:
        raise UsageError("--budget must be above zero.", "Write 50MB.")


def _refuse_same(base: Checkpoint, tuned: Checkpoint) -> None:
    if {p.resolve() for p in base.files} == {p.resolve() for p in tuned.files}:
        raise UsageError(
            f"BASE and TUNED are the same files ({base.source}).", "Give the fine-tuned model too."
        )


def _note_swapped(base: Checkpoint, tuned: Checkpoint) -> list[Notice]:
    """A warning where names tell that the base is the tuned one of the two."""
    origin = Path(str(base.config.get("_name_or_path") or "")).name
    sounds = [_TUNED.search(c.name.lower()) is not None for c in (base, tuned)]
    if origin and origin == tuned.name and origin != base.name:
        why = f"{base.name} says that it was made from {origin}"
    elif sounds == [True, False]:
        why = f"{base.name} sounds like a fine-tune and {tuned.name} does not"
    else:
        return []
    text = f"BASE and TUNED may be swapped: {why}. The adapter takes BASE to TUNED."
    return [Notice("swapped", text, str(base.source))]


#: Parts of names that models have after a fine-tune.
_TUNED = re.compile(r"(^|[-_. ])(instruct|chat|it|sft|dpo|grpo|rlhf|ft|(fine-?)?tuned?)($|[-_. ])")


def _published_name(base: Checkpoint) -> str:
    """What people call the base: by its config, by its place in a download cache, or its folder."""
    named = base.config.get("_name_or_path")
    if isinstance(named, str) and named and not Path(named).is_absolute():
        return named
    for folder in base.directory.absolute().parents:
        if folder.name.startswith("models--"):
            return folder.name.removeprefix("models--").replace("--", "/")
    return base.directory.resolve().name


def _report(
    base: Checkpoint,
    tuned: Checkpoint,
    held: Held,
    output: Path | None,
    dtype: str,
    dry_run: bool,
    uniform: bool,
) -> ExtractReport:
    ranks: list[int | None] = [None] * len(held.factors) if dry_run else list(held.ranks)
    modules = [_module(f, r) for f, r in zip(held.factors, ranks, strict=True)]
    energy, cut, least = held.total, 0.0, 0.0
    for own, rank in zip(held.factors, held.ranks, strict=False):
        more = own.at(rank)
        cut, least = cut + more[0], least + more[1]
    lost = sum(f.size.energy for f in held.left)
    known = not dry_run and energy > 0
    kept = sum(f.size.energy * (m.kept or 0) for f, m in zip(held.factors, modules, strict=True))
    rounded = sum(
        f.size.energy * (m.kept or 0) * (m.rounding or 0) ** 2
        for f, m in zip(held.factors, modules, strict=True)
    )
    report = ExtractReport(
        base=str(base.source),
        tuned=str(tuned.source),
        output=str(output or ""),
        dtype=dtype,
        dry_run=dry_run,
        rank=max(held.ranks, default=None),
        uniform=len(set(held.ranks)) == 1 or uniform,
        modules=modules,
        saved=[_other(f) for f in held.whole],
        left=[_other(f) for f in held.left],
        unchanged=held.unchanged,
        norm=math.sqrt(energy),
        held=max(0.0, 1 - (cut + lost) / energy) if known else None,
        error=math.sqrt((cut + lost) / energy) if known else None,
        best_error=math.sqrt((least + lost) / energy) if known else None,
        noise=_noise(held.factors),
        rounding=math.sqrt(rounded / kept) if kept and dtype != "float32" else None,
        bytes_tuned=sum(p.stat().st_size for p in tuned.files),
        bytes_written=held.nbytes,
        held_by_rank=_held_by_rank(held, lost) if known else {},
        verified=held.verified,
        warnings=held.notices,
    )
    report.warnings += _note_fit(report, sum(f.size.weight for f in held.factors))
    return report


def _note_fit(report: ExtractReport, weight: float) -> list[Notice]:
    """What to think of the result, where it is not what people hope for."""
    notices = []
    if report.norm**2 > weight:
        text = (
            f"The change is {report.norm / math.sqrt(weight or 1):.2g} times the norm of the "
            "weights; two models that have nothing to do with each other are 1.4 times apart. Is "
            "this the right base?"
        )
        notices.append(Notice("unrelated", text))
    if report.held is not None and report.held < _LITTLE and not report.left:
        text = (
            f"The adapter holds {report.held:.1%} of the change, which is far from low-rank. Try a "
            "higher --rank, or --energy 0.9 --max-rank 256."
        )
        notices.append(Notice("holds-little", text))
    if report.bytes_written > report.bytes_tuned:
        notices.append(Notice("larger-than-model", "The adapter is larger than the model itself."))
    return notices


#: A share below which an adapter can hardly stand for its fine-tune.
_LITTLE = 0.3


def _noise(factors: Sequence[Found]) -> float:
    energy = math.fsum(f.size.energy for f in factors)
    return math.sqrt(math.fsum(f.size.noise for f in factors) / energy)


def _held_by_rank(held: Held, lost: float) -> dict[int, float]:
    """`held` of the report if all modules had this rank, as far as their spectra are known.

    Where a spectrum is known in part, its last values are a little too small.
    """
    spectra = [(f, np.concatenate([f.values, f.following]) ** 2) for f in held.factors]
    longest = max(len(squares) for _, squares in spectra)
    known = min((len(squares) for f, squares in spectra if f.passes), default=longest)
    found = {}
    for rank in (2**i for i in range(20) if 2**i <= known):
        cut = math.fsum(f.size.energy - float(squares[:rank].sum()) for f, squares in spectra)
        found[rank] = max(0.0, 1 - (cut + lost) / held.total)
    return found


def _module(found: Found, rank: int | None) -> ExtractedModule:
    size, place = found.size, found.part.place
    module = ExtractedModule(
        path=place.path,
        kind=place.kind,
        shape=place.shape,
        norm=math.sqrt(size.energy),
        relative=math.sqrt(size.energy / size.weight) if size.weight else None,
        noise=math.sqrt(size.noise / size.energy),
    )
    if rank is None:
        return module
    cut, least = found.at(rank)
    values = [*found.values.tolist(), *found.following.tolist()]
    return replace(
        module,
        rank=rank,
        kept=max(0.0, 1 - cut / size.energy),
        error=math.sqrt(cut / size.energy),
        best_error=math.sqrt(least / size.energy),
        rounding=found.rounding,
        stable_rank=size.energy / values[0] ** 2,
        singular_values=values,
    )


def _other(found: Found) -> OtherTensor:
    info = found.part.tuned
    numbers = found.part.is_comparable and info.is_float
    norm = math.sqrt(found.size.energy) if numbers else None
    return OtherTensor(found.part.name, info.shape, info.nbytes, norm)
