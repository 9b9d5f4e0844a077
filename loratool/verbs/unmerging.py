"""Take deltas out of a merged model: bit for bit with an undo file, by subtraction without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.weighting import Weight
from loratool.answers import Answer
from loratool.dtypes import MODEL_DTYPES, dtype_name
from loratool.errors import RestoreError, UsageError, listed
from loratool.merging.ingredients import ingredients, known_files
from loratool.merging.output import write_beside, write_index
from loratool.merging.plan import Plan
from loratool.merging.planning import build_plan
from loratool.merging.provenance import Merged, describe
from loratool.merging.subtraction import plan_subtraction, refuse_irreversible
from loratool.merging.undo.file import Undo
from loratool.merging.undo.kept_base import kept_base
from loratool.merging.undo.predicted import refuse_other_tensors
from loratool.merging.undo.sidefiles import changed_since, put_back
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import Quantised, refuse_dtype
from loratool.models.sidefiles import side_files_of
from loratool.notices import Notice, document
from loratool.storage.destination import (
    free_bytes,
    refuse_company,
    refuse_full_disk,
)
from loratool.storage.filenames import INDEX, PROVENANCE
from loratool.storage.hashing import digest_of
from loratool.storage.journal import WorkOrder
from loratool.storage.jsonfile import write_json
from loratool.storage.workfolder import WorkFolder
from loratool.streams.run import Run
from loratool.streams.shares import SharedOut
from loratool.verbs.making import (
    complete_output,
    make_in_cluster,
    memory_of,
    own_files,
    recordable,
    worked,
)


@dataclass(repr=False)
class UnmergeReport(Answer):
    """What an unmerge did, or with `dry_run` would do. Sizes are bytes, times seconds.

    `exact` is True where the base comes back bit for bit. Where it does not, `expected_changed` is
    the share of the adapted weights that will differ from the base's, estimated from a sample.
    """

    merged: str
    adapters: list[str]
    weights: list[float | str]
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
    #: What of each adapter was never merged, by the model's record.
    excluded: list[list[str]] = field(default_factory=list)
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
class Request:
    """What is to be taken out of what: the arguments of `unmerge`, opened and checked.

    Adapters and weights are in the order of merging; `remaining` are those that stay merged.
    """

    merged: Checkpoint
    record: dict[str, Any]
    adapters: list[Adapter]
    weights: list[Weight]
    remaining: list[Merged]
    target: Path
    run: Run
    #: How it was asked for.
    verb: Callable[..., Any]
    arguments: dict[str, Any]

    def order(self, made_of: dict[str, Any], files: dict[str, int]) -> WorkOrder:
        return WorkOrder(self.verb.__name__, recordable(self.arguments), made_of, files)


# --------------------------------------------------------------------------- with the undo file


def restore_base(
    request: Request, undo: Undo, originals: str | Path | None, dtype: str | None
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
    refuse_full_disk(base.nbytes, request.target)
    if run.dry_run:
        return report
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
    order = request.order(
        {
            **ingredients(plan, [undo.path, *merged.files]),
            "undo": digest_of(repr(sorted(undo.tensors.items())).encode()),
        },
        sizes,
    )

    def make(work: WorkFolder) -> tuple[SharedOut | None, list[Notice]]:
        if run.cluster is not None:
            make_in_cluster(work, run, request.verb, memory_of(plan))
        else:
            own = [shard for shard in undo.shards if shard.file in own_files(order, run)]
            restore(plan, merged, undo, own, work, run)
        return complete_output(work, run, fill)

    report.share, notices = worked(request.target, order, run, make)
    report.warnings += notices
    return report


# ----------------------------------------------------------------------------- by subtraction


def subtract_deltas(request: Request, base: str | Path | None, dtype: str | None) -> UnmergeReport:
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
    refuse_full_disk(plan.bytes_to_write + files.nbytes, request.target)
    if run.dry_run:
        return report
    from loratool.merging.executor import execute

    originals = {} if base is None else {"originals": known_files(*_files_of(plan))}
    sizes = {shard.name: shard.nbytes for shard in plan.outputs}
    order = request.order({**ingredients(plan), **originals}, sizes)

    def make(work: WorkFolder) -> tuple[SharedOut | None, list[Notice]]:
        if run.cluster is not None:
            make_in_cluster(work, run, request.verb, memory_of(plan))
        else:
            own = own_files(order, run)
            execute([shard for shard in plan.outputs if shard.name in own], work, run)

        def fill(folder: Path) -> list[Notice]:
            write_beside(plan, folder, files)
            shards = {name: work.note(name)["digest"] for name in plan.shards}
            document = describe(plan, "unmerge", shards, {})
            document["removed"] = document["adapters"]
            document["adapters"] = [entry.document for entry in request.remaining]
            document["base"]["adapters"] = []
            write_json(folder / PROVENANCE, document)
            plan.refuse_changed()
            return []

        return complete_output(work, run, fill)

    report.share, notices = worked(request.target, order, run, make)
    report.warnings += notices
    return report


def _files_of(plan: Plan) -> list[Path]:
    """The files that hold what is written."""
    return sorted({path for shard in plan.outputs for path in shard.sources})


def _report(request: Request, plan: Plan, nbytes: int) -> UnmergeReport:
    return UnmergeReport(
        merged=request.merged.label,
        adapters=[a.label for a in request.adapters],
        weights=[weight.document for weight in request.weights],
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
        excluded=[list(adapter.left_out) for adapter in request.adapters],
        warnings=list(plan.notices),
    )
