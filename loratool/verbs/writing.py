"""Carry out the plan of a merge: refuse, report, write, verify, push."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.effect import note_slips
from loratool.adapters.finite import refuse_not_finite
from loratool.errors import FileError, HubError
from loratool.merging.delta_loss import note_loss, refuse_loss, sample_kept
from loratool.merging.identity import held_by, note_doing_nothing, refuse_held
from loratool.merging.ingredients import ingredients
from loratool.merging.initial import derivation_of
from loratool.merging.options import MergeOptions
from loratool.merging.output import write_beside
from loratool.merging.plan import OutputShard, Plan
from loratool.merging.provenance import describe, read_record
from loratool.merging.range_loss import sample_range_loss
from loratool.merging.report import MergeReport
from loratool.merging.undo.sidefiles import keep_base, note_large, previous
from loratool.merging.written import Written
from loratool.models.layouts.names import is_token_embedding
from loratool.models.sidefiles import SideFiles, side_files_of
from loratool.models.tokenizers import note_ids_without_rows
from loratool.notices import Notice
from loratool.publishing.target import merge_target
from loratool.storage.destination import free_bytes, refuse_company, refuse_full_disk
from loratool.storage.filenames import PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.journal import WorkOrder, as_json
from loratool.storage.jsonfile import write_json
from loratool.storage.placing import place_of
from loratool.storage.staging import PassingDirectory
from loratool.storage.workfolder import WorkFolder
from loratool.storage.worksites import finished_bytes
from loratool.streams.run import Run
from loratool.streams.shares import SharedOut
from loratool.streams.threads import cores
from loratool.verbs.making import (
    complete_output,
    make_in_cluster,
    memory_of,
    own_files,
    recordable,
    worked,
)

if TYPE_CHECKING:
    from loratool.publishing.shard_upload import Shipment
    from loratool.storage.hub.repository import Repository


def write_planned(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    run: Run,
    arguments: Mapping[str, Any],
    verb: Callable[..., Any],
) -> MergeReport:
    """Write the model that a plan makes to `target` and where `options` says; in a dry run, say
    what that would take. `verb` is the library's function that does it, and `arguments` are those
    that it was called with."""
    command = verb.__name__
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
        refuse_full_disk(report.bytes_needed - finished_bytes(target), target)
        return report
    # Who gives shares to tasks has decided already that what is there is to be replaced.
    if run.share is not None and run.share.completes and _is_made(plan, command, target):
        report.share = SharedOut(str(run.share), [], [], complete=True, before=True)
        return report
    order = WorkOrder(
        command, recordable(arguments), {**ingredients(plan), "reversible": options.reversible},
        {shard.name: shard.nbytes for shard in plan.outputs},
    )  # fmt: skip
    refuse_full_disk(report.bytes_needed - finished_bytes(target), target)
    if repository is not None:
        report.created = not repository.exists
        repository.create(
            options.private
        )  # before anything large is downloaded: may it be written to?
        report.private = repository.private
    side_files.fetch()
    making = _Making(plan, target, side_files, report, run, repository, options, order, verb)
    if options.keep:
        making.fetch()
    making.make()
    return report


@dataclass
class _Making:
    """A model on its way to the disk and to the Hub; the report is filled in on the way."""

    plan: Plan
    target: Path
    side_files: SideFiles
    report: MergeReport
    run: Run
    repository: Repository | None
    options: MergeOptions
    order: WorkOrder
    verb: Callable[..., Any]

    @property
    def outputs(self) -> list[OutputShard]:
        """The shards that this process makes."""
        return [o for o in self.plan.outputs if o.name in own_files(self.order, self.run)]

    def fetch(self) -> None:
        """Download what of the base is not here and is needed."""
        base, needed = self.plan.base, self.report.bytes_needed
        if self.run.cluster is not None:
            return  # each task has what it needs on its own node
        if self.run.share is None:
            base.fetch()
        else:
            base.folder.fetch(self.plan.files_for(self.outputs))
        refuse_full_disk(needed - finished_bytes(self.target), self.target)

    def make(self) -> None:
        """Write the shards, and where all of them are there, the model."""
        if not self.options.keep:
            with PassingDirectory(self.target, self.run.overwrite) as place:
                own, written = self._shards(place)
                assert own is not None
                self._fill(place.path, place.path, written)
                self._ship(own, place.path)
            return
        shipment: Shipment | None = None

        def make(work: WorkFolder) -> tuple[SharedOut | None, list[Notice]]:
            nonlocal shipment
            if self.run.cluster is not None:
                make_in_cluster(work, self.run, self.verb, memory_of(self.plan))
            else:
                shipment, _ = self._shards(work)

            def fill(folder: Path) -> list[Notice]:
                written = Written()
                for name in self.plan.shards:
                    written += Written.noted(name, work.note(name))
                self._fill(folder, work.parts, written)
                return []

            return complete_output(work, self.run, fill)

        self.report.share, notices = worked(self.target, self.order, self.run, make)
        self.report.warnings += notices
        if shipment is not None:
            self._ship(shipment, place_of(self.target))

    def _shards(self, place: WorkFolder | PassingDirectory) -> tuple[Shipment | None, Written]:
        """Make the shards of this process."""
        from loratool.merging.executor import Care, execute  # torch: about two seconds to import

        with ExitStack() as stack:
            care = Care()
            shipment = None
            if self.repository is not None:
                from loratool.publishing.shard_upload import Shipment

                shipment = Shipment(
                    self.plan, place.finished, self.repository, self.report.kept, self.run
                )
                care = replace(care, courier=stack.enter_context(shipment))
            elif self.options.verify:
                from loratool.merging.proof.pairing import check_written

                care = replace(
                    care,
                    check=lambda shard, where: check_written([shard], where, self.run.silent()),
                )
            if self.report.reversible:
                from loratool.merging.undo.recording import UndoRecorder

                recorder = stack.enter_context(UndoRecorder(self.plan, place.own))
                care = replace(care, recorder=recorder)
            written = execute(self.outputs, place, self.run, care)
            if shipment is not None:
                shipment.settle()
            return shipment, written

    def _fill(self, folder: Path, parts: Path, written: Written) -> None:
        """Complete the folder of all shards, and say in the report what came of them."""
        plan, report, counts = self.plan, self.report, written.counts
        write_beside(plan, folder, self.side_files)
        report.subnormal, report.zeroed = counts.subnormal, counts.zeroed
        report.lost = counts.share_lost
        report.kept_of_delta = counts.kept_of_delta
        report.warnings += note_loss(report.kept_of_delta, plan)
        report.verified = self.options.verify or self.repository is not None
        result: dict[str, Any] = {"subnormal": report.subnormal, "zeroed": report.zeroed}
        if report.kept_of_delta is not None:
            result["kept_of_delta"] = report.kept_of_delta.to_dict()
        record = describe(plan, self.order.command, written.shards, result, held_by(plan.base))
        if report.reversible:
            from loratool.merging.undo.assembling import assemble

            kept = keep_base(plan, folder, self.side_files)
            report.undo_bytes = assemble(plan, kept, written.recorded, parts, self.run)
            report.warnings += note_large(report.undo_bytes, plan)
            record["undo"] = {"file": f"{UNDO_FOLDER}/{UNDO}", "bytes": report.undo_bytes}
        write_json(folder / PROVENANCE, record)
        plan.refuse_changed()

    def _ship(self, shipment: Shipment, folder: Path) -> None:
        """Make the commit that brings the model to its place on the Hub."""
        report = self.report
        try:
            done, notices = shipment.finish(folder)
        except HubError as error:
            if report.kept:
                hint = f"{error.hint} The merge itself is complete: {report.output}. Run it again "
                error.hint = hint + "with --overwrite, or push it: loratool push."
            raise
        report.pushed, report.commit = done.url, done.commit
        report.resumed = shipment.resumed
        report.warnings += notices


def _is_made(plan: Plan, command: str, target: Path) -> bool:
    """Whether the output that a worker works for is in its place, made of the same."""
    with suppress(FileError):
        record = read_record(target)
        if record is not None:
            own = describe(plan, command, {}, {}, held_by(plan.base))
            parts = ("command", "versions", "options", "base", "adapters")
            return all(record.get(part) == as_json(own[part]) for part in parts)
    return False


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
        weights=[weight.document for weight in plan.weights],
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
        excluded=[list(adapter.left_out) for adapter in plan.adapters],
        warnings=[*plan.notices, *files.notices, *rowless],
        kept=options.keep,
        derivation=derivation_of(plan),
        quantised=str(plan.treatment) if plan.treatment is not None else "",
    )
