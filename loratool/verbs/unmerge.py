"""unmerge: take adapters out of a merged model again.

With the undo file of a reversible merge the base comes back bit for bit, and the hash of every
tensor is checked. Without it the deltas are subtracted and the result rounded once: near the base,
but not the base.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.dtypes import MODEL_DTYPES, dtype_name
from loratool.errors import RestoreError, UsageError, explained_os_errors, listed
from loratool.merging.ingredients import ingredients, known_files
from loratool.merging.output import write_beside, write_index
from loratool.merging.plan import Plan
from loratool.merging.planning import build_plan
from loratool.merging.provenance import Merged, describe, identify, merged_into, read_record
from loratool.merging.subtraction import plan_subtraction, refuse_irreversible
from loratool.merging.undo.file import Undo
from loratool.merging.undo.kept_base import kept_base
from loratool.merging.undo.predicted import refuse_other_tensors
from loratool.merging.undo.sidefiles import changed_since, fetch_undo, open_undo, put_back
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import Quantised, refuse_dtype
from loratool.models.sidefiles import side_files_of
from loratool.notices import Notice, document
from loratool.storage.destination import (
    Overwrite,
    check_output,
    free_bytes,
    refuse_company,
    refuse_full_disk,
)
from loratool.storage.filenames import INDEX, PROVENANCE
from loratool.storage.hashing import digest_of
from loratool.storage.journal import Recipe
from loratool.storage.jsonfile import write_json
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.shares import Share, SharedOut, parse_share
from loratool.verbs.inputs import (
    as_list,
    check_dtype,
    check_paths,
    check_weights,
    told_before,
    told_of,
)
from loratool.verbs.making import as_place, complete, own_files, recordable, work_folder


@dataclass
class UnmergeReport:
    """What an unmerge did, or with `dry_run` would do. Sizes are bytes, times seconds.

    `exact` is True where the base comes back bit for bit. Where it does not, `expected_changed` is
    the share of the adapted weights that will differ from the base's, estimated from a sample.
    """

    merged: str
    adapters: list[str]
    weights: list[float]
    output: str
    exact: bool
    dtype: str
    dry_run: bool
    shards: list[str]
    modules: int
    tensors: int
    parameters: int
    bytes_written: int
    bytes_free: int
    undo_bytes: int
    remaining: list[str]
    expected_changed: float | None = None
    copied_from_base: int = 0
    side_files: list[str] = field(default_factory=list)
    #: How far the output is, where this run was one of several workers.
    share: SharedOut | None = None
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = document(self, "warnings")
        if self.share is not None:
            found["share"] = self.share.to_dict()
        return found


@dataclass(frozen=True)
class _Request:
    """What is to be taken out of what: the arguments of `unmerge`, opened and checked.

    Adapters and weights are in the order of merging; `remaining` are those that stay merged.
    """

    merged: Checkpoint
    record: dict[str, Any]
    adapters: list[Adapter]
    weights: list[float]
    remaining: list[Merged]
    target: Path
    run: Run
    #: As `unmerge` was called.
    arguments: dict[str, Any]

    def recipe(self, made_of: dict[str, Any], files: dict[str, int]) -> Recipe:
        return Recipe("unmerge", recordable(self.arguments), made_of, files)


@explained_os_errors()
def unmerge(
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    told: Told | Sequence[Told] = (),
    expert_b_layout: str | None = None,
    subtract: bool = False,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    restart: bool = False,
    worker: str | Share | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Take LoRA adapters out of a merged model on disk and write the result to `output`.

    Parameters
    ----------
    merged: model directory that `merge` wrote, or another one that holds the adapters.
    adapters: the adapters that were merged; all of them to get the base back bit for bit.
    output: directory to make; it appears complete or not at all.
    weights: what the adapters were merged with. Known from loratool.json where there is one, and
        then only checked; else 1.0 each.
    base: originals, complete or in part (a directory, or one shard): what is there is copied, the
        rest subtracted. Not needed with an undo file.
    dtype: of the result where it is subtracted; the base's by default, if known.
    told, expert_b_layout: as it was for `merge`.
    subtract: do without the undo file.
    overwrite: replace an output that exists; "all" also with files that are no part of it.
    dry_run: report only; nothing is written.
    restart, worker, ray: as for `merge`.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    RestoreError: adapters or weights that were not merged, a tensor that does not come out as it
        was, or what cannot be taken back without the undo file. FileError, AdapterError, BaseError,
        MatchError, OutputError as in `merge`.
    """
    started = time.perf_counter()
    run = Run(
        threads, progress, overwrite, dry_run, restart=restart, share=parse_share(worker),
        cluster=ray,
    )  # fmt: skip
    sources = as_list(adapters)
    check_paths([merged, output], sources, "loratool unmerge MERGED ADAPTER -o OUT")
    if dtype is not None:
        check_dtype(dtype)
    factors = check_weights(weights, sources) if weights else None
    target = Path(output)
    originals = [Path(base)] if base is not None else []
    check_output(target, [Path(merged), *originals, *map(Path, sources)], overwrite)
    arguments = {
        "merged": as_place(merged), "adapters": [as_place(source) for source in sources],
        "weights": factors, "base": None if base is None else as_place(base), "dtype": dtype,
        "told": told if isinstance(told, Told) else list(told), "expert_b_layout": expert_b_layout,
        "subtract": subtract, "overwrite": overwrite,
    }  # fmt: skip
    checkpoint = open_checkpoint(merged)
    checkpoint.folder.fetch([PROVENANCE])
    record = read_record(checkpoint.directory) if checkpoint.is_directory else None
    recorded = record["options"].get("expert_b_layout") if record else None
    said = told_of(told or told_before(record, sources) or (), sources, expert_b_layout or recorded)
    model = dequantised(checkpoint)
    loras = [read_lora(source, own, model) for source, own in zip(sources, said, strict=True)]
    checkpoint.fetch()
    fetch_undo(checkpoint.folder)
    undo = None if subtract else open_undo(checkpoint, record)
    inputs = [
        path.resolve() for path in (*checkpoint.files, *(path for a in loras for path in a.files))
    ]
    check_output(target, inputs, overwrite)
    for lora in loras:
        refuse_not_finite(lora)
    known = loras, factors or [1.0] * len(loras), list[Merged]()
    if record is not None:
        known = _recognised(checkpoint, loras, factors, undo is not None)
    request = _Request(checkpoint, record or {}, *known, target, run, arguments)
    if undo is not None:
        report = _restore(request, undo, base, dtype)
    else:
        report = _subtract(request, base, dtype)
    report.seconds = time.perf_counter() - started
    return report


def _recognised(
    merged: Checkpoint, adapters: list[Adapter], weights: list[float] | None, exact: bool
) -> tuple[list[Adapter], list[float], list[Merged]]:
    """The adapters in the order of merging, their weights by the record, and those that stay."""
    held = merged_into(merged.directory)
    # With the undo file, what the base held before stays where it was.
    earlier = merged_into(merged.directory, of_base=True)
    everything = held if exact else [*earlier, *held]
    if not everything:
        raise RestoreError(
            f"{merged.label}: by its {PROVENANCE} no adapter is merged into it.",
            "It may be what `unmerge` made; check the path.",
        )
    found = identify(adapters, everything, weights, earlier if exact else ())
    order = sorted(range(len(found)), key=lambda i: found[i])
    remaining = [entry for i, entry in enumerate(everything) if i not in found]
    chosen = [everything[found[i]].weight for i in order]
    return [adapters[i] for i in order], chosen, remaining


# --------------------------------------------------------------------------- with the undo file


def _restore(
    request: _Request, undo: Undo, originals: str | Path | None, dtype: str | None
) -> UnmergeReport:
    """Give the base back bit for bit."""
    merged, run = request.merged, request.run
    if dtype is not None:
        raise UsageError(
            "The undo file gives the base back in its own dtype.",
            "Omit --dtype, or add --subtract.",
        )
    if request.remaining:
        raise RestoreError(
            f"{merged.label}: the undo file gives back what was before all its adapters were "
            f"merged. Not given:\n{listed(map(str, request.remaining))}",
            "Give all of them, then merge again what should stay: that is exact. To subtract "
            "the given ones alone, rounding again, use --subtract.",
        )
    options = request.record["options"]
    base = kept_base(undo, merged)
    plan = build_plan(
        base,
        request.adapters,
        request.weights,
        options["dtype"],
        bool(options.get("allow_unmatched")),
        options.get("components") or (),
        as_it_is=True,  # the undo file has what was taken off the base
        quantised=Quantised(options.get("quantised"), trained_here=True),
    )
    refuse_other_tensors(plan, merged, undo)
    report = _report(request, plan, base.nbytes)
    if originals is not None:
        text = f"{originals} is not read: the undo file holds all that is missing."
        report.warnings.insert(0, Notice("base-not-needed", text))
    report.exact, report.dtype, report.undo_bytes = True, "base", undo.nbytes
    report.tensors, report.parameters = len(undo.tensors), base.parameters
    report.shards = [shard.file for shard in undo.shards]
    report.side_files = sorted(undo.side_files)
    merged.folder.fetch(undo.side_files.keys() - undo.files.keys())
    report.warnings += changed_since(merged.folder, undo)
    refuse_company(request.target, undo.side_files, run.overwrite)
    if run.dry_run:
        return report
    refuse_full_disk(base.nbytes, request.target)
    from loratool.merging.undo.restoring import restore  # torch: about two seconds to import

    def fill(folder: Path) -> list[Notice]:
        put_back(undo, merged.directory, folder)
        if INDEX not in undo.files and len(undo.shards) > 1:
            places = {name: shard.file for shard in undo.shards for name in shard.tensors}
            write_index(folder, places, base.nbytes)
        plan.refuse_changed()
        merged.folder.refuse_changed()
        return []

    sizes = {s.file: sum(undo.tensors[n].info.nbytes for n in s.tensors) for s in undo.shards}
    recipe = request.recipe({**ingredients(plan), "undo": _undo_ingredients(undo, merged)}, sizes)
    with work_folder(request.target, recipe, run) as work:
        report.warnings += work.notices
        own = [shard for shard in undo.shards if shard.file in own_files(recipe, run)]
        restore(plan, merged, undo, own, work, run)
        report.share, notices = complete(work, run, fill)
        report.warnings += notices
    return report


def _undo_ingredients(undo: Undo, merged: Checkpoint) -> dict[str, Any]:
    return {
        "tensors": digest_of(repr(sorted(undo.tensors.items())).encode()),
        "files of the merged model": known_files(undo.path, *merged.files),
    }


# ----------------------------------------------------------------------------- by subtraction


def _subtract(request: _Request, base: str | Path | None, dtype: str | None) -> UnmergeReport:
    """Subtract the deltas and round once."""
    merged, record, run = dequantised(request.merged), request.record, request.run
    asked = dtype
    if dtype is None:
        known = record["base"].get("dtypes", []) if record else []
        only = dtype_name(known[0]) if len(known) == 1 else "base"
        dtype = only if only in MODEL_DTYPES else "base"
    found = plan_subtraction(merged, request.adapters, request.weights, dtype, base, record, run)
    plan = found.plan
    if plan.treatment is not None:
        refuse_dtype(asked, plan.treatment, "loratool dequantise, of the result")
        dtype = plan.dtype
    refuse_irreversible(found, record)
    report = _report(request, plan, plan.bytes_to_write)
    if not record:
        text = (
            f"{merged.label} has no {PROVENANCE}: nothing says that these adapters were merged "
            "into it, or with which weights. `loratool verify` can tell, with the base."
        )
        report.warnings.insert(0, Notice("no-provenance", text))
    report.dtype, report.copied_from_base = dtype, len(found.originals)
    from loratool.merging.undo.sampling import changed_by_cycle  # torch: about two seconds

    if not (plan.treatment and plan.treatment.back):  # what quantisation took is not known
        adapted = sum(job.source.numel for job in found.forward.jobs if job.is_arithmetic)
        subtracted = sum(job.source.numel for job in plan.jobs if job.is_arithmetic)
        share = subtracted / max(1, adapted)
        report.expected_changed = share * changed_by_cycle(found.forward, plan)
    report.exact = found.is_base and not request.remaining
    files = side_files_of(merged)
    if plan.rewriting is not None:
        files.leave(plan.rewriting.without, "of the quantisation")
    files.fetch()
    report.side_files = sorted(files.copied)
    refuse_company(request.target, files.copied, run.overwrite)
    report.warnings += files.notices
    if run.dry_run:
        return report
    refuse_full_disk(plan.bytes_to_write + files.nbytes, request.target)
    from loratool.merging.executor import execute

    def fill(folder: Path) -> list[Notice]:
        write_beside(plan, folder, files)
        shards = {name: (work.note_of(name) or {})["digest"] for name in plan.shards}
        document = describe(plan, "unmerge", shards, {})
        document["removed"] = document["adapters"]
        document["adapters"] = [entry.document for entry in request.remaining]
        document["base"]["adapters"] = []
        write_json(folder / PROVENANCE, document)
        plan.refuse_changed()
        return []

    originals = {} if base is None else {"originals": known_files(*_files_of(plan))}
    sizes = {shard.name: shard.nbytes for shard in plan.outputs}
    recipe = request.recipe({**ingredients(plan), **originals}, sizes)
    with work_folder(request.target, recipe, run) as work:
        report.warnings += work.notices
        own = own_files(recipe, run)
        execute([shard for shard in plan.outputs if shard.name in own], work, run)
        report.share, notices = complete(work, run, fill)
        report.warnings += notices
    return report


def _files_of(plan: Plan) -> list[Path]:
    """The files that hold what is written."""
    return sorted({path for shard in plan.outputs for path in shard.sources})


def _report(request: _Request, plan: Plan, nbytes: int) -> UnmergeReport:
    return UnmergeReport(
        merged=request.merged.label,
        adapters=[a.label for a in request.adapters],
        weights=request.weights,
        output=str(request.target),
        exact=False,
        dtype=plan.dtype,
        dry_run=request.run.dry_run,
        shards=list(plan.shards),
        modules=plan.modules,
        tensors=len(plan.jobs),
        parameters=sum(job.source.numel for job in plan.jobs),
        bytes_written=nbytes,
        bytes_free=free_bytes(request.target),
        undo_bytes=0,
        remaining=[str(entry) for entry in request.remaining],
        warnings=list(plan.notices),
    )
