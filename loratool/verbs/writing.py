"""Carry out the plan of a merge: refuse, report, write, verify, push."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.effect import note_slips
from loratool.adapters.finite import refuse_not_finite
from loratool.errors import HubError
from loratool.merging.delta_loss import note_loss, refuse_loss, sample_kept
from loratool.merging.identity import held_by, note_doing_nothing, refuse_held
from loratool.merging.initial import derivation_of
from loratool.merging.options import MergeOptions
from loratool.merging.output import write_model
from loratool.merging.plan import Plan
from loratool.merging.provenance import describe
from loratool.merging.range_loss import sample_range_loss
from loratool.merging.report import MergeReport
from loratool.merging.undo.sidefiles import keep_base, note_large, previous
from loratool.models.layouts.names import is_token_embedding
from loratool.models.sidefiles import SideFiles, side_files_of
from loratool.models.tokenizers import note_ids_without_rows
from loratool.publishing.target import merge_target
from loratool.storage.destination import free_bytes, refuse_company, refuse_full_disk
from loratool.storage.filenames import PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.jsonfile import write_json
from loratool.storage.staging import StagedDirectory
from loratool.streams.run import Run
from loratool.streams.threads import cores

if TYPE_CHECKING:
    from loratool.publishing.shard_upload import Shipment
    from loratool.storage.hub.repository import Repository


def write_planned(
    plan: Plan, target: Path, options: MergeOptions, run: Run, command: str = "merge"
) -> MergeReport:
    """Write the model that a plan makes to `target` and where `options` says; in a dry run, say
    what that would take. `command` is what loratool.json calls it."""
    repository = None
    if options.push is not None:
        repository = merge_target(plan, options.push, options.private, run.overwrite, run.dry_run)
    side_files = side_files_of(
        plan.base, [(a.owner, a.folder) for a in plan.adapters], options.tokenizer
    )
    if plan.rewriting is not None:
        side_files.leave(plan.rewriting.without, "of the quantisation")
    report = _report(plan, target, side_files, run.dry_run, options)
    refuse_company(target, side_files.copied, run.overwrite)
    if repository is not None:
        report.pushed = repository.url
        if not options.keep:
            from loratool.publishing.shard_upload import space_needed

            report.bytes_needed = space_needed(plan) + side_files.nbytes
    for adapter in plan.inputs:
        refuse_not_finite(adapter)
    report.warnings += note_slips(plan.adapters, plan.weights)
    report.warnings += note_doing_nothing(plan.adapters, plan.weights)
    if not options.again:
        refuse_held(plan.base, plan.adapters)
    if not options.quantised.force:
        refuse_loss(plan, run)
    if run.dry_run:
        report.kept_of_delta = sample_kept(plan, run)
        report.warnings += note_loss(report.kept_of_delta, plan)
        report.range_loss = sample_range_loss(plan)
        if report.derivation is not None:
            from loratool.merging.derivation import seconds_for

            seconds = seconds_for(report.derivation, run.threads or min(8, cores()))
            report.derivation = replace(report.derivation, seconds=seconds)
        if options.reversible:
            from loratool.merging.undo.sampling import undo_bytes

            plan.base.fetch()
            report.undo_bytes = undo_bytes(plan)
            report.warnings += note_large(report.undo_bytes, plan)
        return report
    refuse_full_disk(report.bytes_needed, target)
    if repository is not None:
        report.created = not repository.exists
        repository.create(
            options.private
        )  # before anything large is downloaded: may it be written to?
        report.private = repository.private
    side_files.fetch()
    if options.keep:
        plan.base.fetch()
        refuse_full_disk(report.bytes_needed, target)
    _write(plan, target, side_files, report, run, repository, options, command)
    return report


def _write(
    plan: Plan,
    target: Path,
    side_files: SideFiles,
    report: MergeReport,
    run: Run,
    repository: Repository | None,
    options: MergeOptions,
    command: str,
) -> None:
    """Write the model, here and on the Hub, and fill in what came of it."""
    with StagedDirectory(target, run.overwrite) as staged, ExitStack() as stack:
        shipment = recorder = None
        if repository is not None:
            from loratool.publishing.shard_upload import Shipment

            shipment = Shipment(plan, staged.path, repository, report.kept, run)
            stack.enter_context(shipment)
        if report.reversible:
            from loratool.merging.undo.recording import UndoRecorder

            recorder = UndoRecorder(plan, keep_base(plan, staged.path, side_files))
        with recorder or nullcontext():
            written = write_model(plan, staged.path, side_files, run, recorder, shipment)
        report.subnormal, report.zeroed = written.counts.subnormal, written.counts.zeroed
        report.lost = written.counts.share_lost
        report.kept_of_delta = written.counts.kept_of_delta
        report.warnings += note_loss(report.kept_of_delta, plan)
        if options.verify and shipment is None:
            from loratool.merging.proof.pairing import check_written

            check_written(plan.outputs, staged.path, run)
        report.verified = options.verify or shipment is not None
        plan.refuse_changed()
        result: dict[str, Any] = {"subnormal": report.subnormal, "zeroed": report.zeroed}
        if report.kept_of_delta is not None:
            result["kept_of_delta"] = report.kept_of_delta.to_dict()
        record = describe(plan, command, written.shards, result, held_by(plan.base))
        if recorder is not None:
            report.undo_bytes = recorder.nbytes
            report.warnings += note_large(report.undo_bytes, plan)
            record["undo"] = {"file": f"{UNDO_FOLDER}/{UNDO}", "bytes": recorder.nbytes}
        write_json(staged.path / PROVENANCE, record)
        if shipment is not None:
            shipment.settle()
        if report.kept:
            report.warnings += staged.commit()
        if shipment is not None:
            _ship(shipment, staged.path, report)


def _ship(shipment: Shipment, folder: Path, report: MergeReport) -> None:
    """Make the commit that brings the model to its place on the Hub."""
    try:
        done, notices = shipment.finish(folder)
    except HubError as error:
        if report.kept:
            hint = f"{error.hint} The merge itself is complete: {report.output}. Run it again with "
            error.hint = hint + "--overwrite, or push it: loratool push."
        raise
    report.pushed, report.commit = done.url, done.commit
    report.resumed = shipment.resumed
    report.warnings += notices


def _report(
    plan: Plan, target: Path, files: SideFiles, dry_run: bool, options: MergeOptions
) -> MergeReport:
    carried = {path.name for path in previous(plan.base)} if options.reversible else set()
    changes: dict[str, list[str]] = {"merge": [], "replace": [], "add": []}
    for job in plan.jobs:
        if job.action in changes:
            changes[job.action].append(job.name)
    rows = {job.name: job.source.shape[0] for job in plan.jobs if is_token_embedding(job.name)}
    rowless = note_ids_without_rows(files.tokenizer.files, rows)
    return MergeReport(
        base=plan.base.label,
        adapters=[a.label for a in plan.adapters],
        trained_on=[a.declared.base_name or "" for a in plan.adapters],
        weights=plan.weights,
        output=str(target) if options.keep else "",
        dtype=plan.dtype,
        dry_run=dry_run,
        shards=list(plan.shards),
        modules=plan.modules,
        tensors=plan.counts(),
        parameters=sum(job.source.numel for job in plan.jobs),
        bytes_to_read=plan.bytes_to_read,
        bytes_written=plan.bytes_to_write,
        bytes_needed=plan.bytes_to_write + files.nbytes,
        bytes_free=free_bytes(target),
        reversible=options.reversible,
        undo_bytes=0,
        changes=changes,
        config_changes=plan.config_changes,
        side_files=sorted(files.copied),
        left_out=[n for n in files.left_out if n.rstrip("/") not in carried],
        tokenizer=files.tokenizer.summary(),
        warnings=[*plan.notices, *files.notices, *rowless],
        kept=options.keep,
        derivation=derivation_of(plan),
        quantised=str(plan.treatment) if plan.treatment is not None else "",
    )
