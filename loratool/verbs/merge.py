"""merge: write `W + Σ weight·scale·B·A` for every tensor of a base model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.effect import note_slips
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.reading import read_lora
from loratool.errors import HubError, explained_os_errors
from loratool.merging.identity import held_by, note_doing_nothing, note_other_base, refuse_held
from loratool.merging.initial import derivation_of
from loratool.merging.options import MergeOptions
from loratool.merging.output import write_model
from loratool.merging.plan import Plan
from loratool.merging.provenance import describe
from loratool.merging.range_loss import sample_range_loss
from loratool.merging.replication import replicated
from loratool.merging.report import MergeReport
from loratool.merging.residual_base import plan_on
from loratool.merging.undo.sidefiles import keep_base, note_large, previous
from loratool.models.checkpoint import open_checkpoint
from loratool.models.layouts.names import is_token_embedding
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import Quantised, refuse_dtype
from loratool.models.sidefiles import SideFiles, side_files_of
from loratool.models.tokenizers import note_ids_without_rows
from loratool.publishing.target import merge_target, workplace
from loratool.storage.destination import (
    Overwrite,
    check_output,
    free_bytes,
    refuse_company,
    refuse_full_disk,
)
from loratool.storage.filenames import PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.jsonfile import write_json
from loratool.storage.staging import StagedDirectory
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.threads import cores
from loratool.verbs.inputs import Source, as_list, as_texts, check_paths, check_weights

if TYPE_CHECKING:
    from loratool.publishing.shard_upload import Shipment
    from loratool.storage.hub.repository import Repository


@explained_os_errors()
def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path | None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
    components: str | Sequence[str] = (),
    expert_b_layout: str | None = None,
    tokenizer: str | None = None,
    again: bool = False,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    reversible: bool = False,
    verify: bool = False,
    initial: str | Path | None = None,
    replicate_layers: bool = False,
    quantised: str | None = None,
    trained_here: bool = False,
    push: str | None = None,
    keep: bool = True,
    private: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge LoRA adapters into a base model on disk, streaming, and write the result to `output`.

    Parameters
    ----------
    base: model directory (safetensors or pytorch_model.bin, sharded or not), or one weights file,
        or a Hub id.
    adapters: PEFT adapter directory, file or Hub id, or several of them.
    output: directory to make; it appears complete or not at all. None with `keep=False`.
    weights: one factor per adapter, of any sign; 1.0 each if not given.
    dtype: "float16", "bfloat16" or "float32" for all floating tensors, or "base" to keep each
        tensor's own; float16 if not given, and bfloat16 for architectures whose activations exceed
        that. Arithmetic is float32 (float64 for float64 tensors), rounded once.
    allow_unmatched: merge what fits when parts of an adapter do not, and record the rest.
    components: the only parts of the base that adapters may go into, by the beginnings of names.
    expert_b_layout: how lora_B of expert stacks lies where an adapter does not tell, "rank-major"
        (PEFT's) or "grouped" (Unsloth's before unsloth-zoo 2026.9.6).
    initial: an adapter as it was before training, where its initialisation changed the base
        (`pissa_niter_N`, CorDA, LoRA-GA): what it holds is taken off the base first.
    replicate_layers: copy layers of the base as the adapter's layer_replication says.
    quantised: what becomes of a quantised base: "plain" (all of it dequantised to `dtype`), "keep"
        (adapted weights and those that are one matrix with them become plain, the rest is copied),
        or "requantise" (adapted weights go back into the base's format). If not given, what no
        adapter touches is copied; else bitsandbytes' formats become plain and others are kept.
    trained_here: the adapter was trained on this very base, whose weights were rescaled for
        quantisation (AWQ).
    tokenizer: whose the output gets, "base" or "adapter"; an adapter's if one brings one.
    again: merge an adapter that the base holds already, by its record.
    overwrite: replace an output that exists; "all" also with files that are no part of it.
    dry_run: plan and report only; nothing is written.
    reversible: also write what `unmerge` needs to give the base back bit for bit.
    verify: read what was written and compare it with the merge computed anew.
    push: repository on the Hub ("org/name") to upload to. Each shard goes up once it is written and
        verified; the model appears there in one commit at the end. A run that was stopped goes on
        where it was.
    keep: False removes each shard here once it is on the Hub, and reads a base from the Hub shard
        by shard, so that neither must fit on the disk. private: make the repository private.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    FileError, AdapterError, BaseError, MatchError: the inputs do not allow an honest merge.
    ValueRangeError: NaN, infinity or overflow. OutputError: the output cannot be written.
    VerifyError: it was written, but is not what was computed. LoginError, HubError: the Hub.
    """
    started = time.perf_counter()
    run = Run(threads, progress, overwrite, dry_run)
    sources = as_list(adapters)
    options = MergeOptions(
        dtype, allow_unmatched, tuple(as_texts(components)), tokenizer, again, reversible, verify,
        push, keep, private, initial, replicate_layers, Quantised(quantised, trained_here),
    )  # fmt: skip
    options.check(output)
    output = output if output is not None else workplace(str(push))
    given = [base, output, *([] if initial is None else [initial])]
    check_paths(given, sources, "loratool merge BASE ADAPTER -o OUT")
    target = Path(output)
    factors = check_weights(weights, sources)
    plan = _planned(base, sources, factors, options, target, overwrite, expert_b_layout)
    repository = None
    if push is not None:
        repository = merge_target(plan, push, private, overwrite, dry_run)
    side_files = side_files_of(plan.base, [(a.owner, a.folder) for a in plan.adapters], tokenizer)
    if plan.rewriting is not None:
        side_files.leave(plan.rewriting.without, "of the quantisation")
    report = _report(plan, target, side_files, dry_run, options)
    refuse_company(target, side_files.copied, overwrite)
    if repository is not None:
        report.pushed = repository.url
        if not keep:
            from loratool.publishing.shard_upload import space_needed

            report.bytes_needed = space_needed(plan) + side_files.nbytes
    for adapter in plan.inputs:
        refuse_not_finite(adapter)
    report.warnings += note_slips(plan.adapters, factors)
    report.warnings += note_doing_nothing(plan.adapters, factors)
    if not again:
        refuse_held(plan.base, plan.adapters)
    if dry_run:
        report.range_loss = sample_range_loss(plan)
        if report.derivation is not None:
            from loratool.merging.derivation import seconds_for

            seconds = seconds_for(report.derivation, run.threads or min(8, cores()))
            report.derivation = replace(report.derivation, seconds=seconds)
        if reversible:
            from loratool.merging.undo.sampling import undo_bytes

            plan.base.fetch()
            report.undo_bytes = undo_bytes(plan)
            report.warnings += note_large(report.undo_bytes, plan)
        return report
    refuse_full_disk(report.bytes_needed, target)
    if repository is not None:
        report.created = not repository.exists
        repository.create(private)  # before anything large is downloaded: may it be written to?
        report.private = repository.private
    side_files.fetch()
    if keep:
        plan.base.fetch()
        refuse_full_disk(report.bytes_needed, target)
    _write(plan, target, side_files, report, run, repository, options)
    report.seconds = time.perf_counter() - started
    return report


def _planned(
    base: Source,
    adapters: Sequence[Source],
    weights: list[float],
    options: MergeOptions,
    target: Path,
    overwrite: Overwrite,
    expert_b_layout: str | None,
) -> Plan:
    """Open everything, see that the output harms none of it, and make the plan."""
    before = [options.initial] if options.initial is not None else []
    check_output(target, [Path(base), *map(Path, [*adapters, *before])], overwrite)
    checkpoint = dequantised(open_checkpoint(base))
    loras = [read_lora(source, expert_b_layout) for source in adapters]
    initial = read_lora(options.initial, expert_b_layout) if options.initial is not None else None
    # What the inputs link to (as files in a download cache do) must not be written to either.
    files = [
        path.resolve()
        for path in (
            *checkpoint.files,
            *(path for a in (*loras, *([initial] if initial else [])) for path in a.files),
        )
    ]
    check_output(target, files, overwrite)
    if options.replicate_layers:
        checkpoint = replicated(checkpoint, loras)
    dtype, notices = options.dtype_for(checkpoint)
    plan = plan_on(
        checkpoint, loras, weights, dtype, options.allow_unmatched, options.components, initial,
        options.quantised,
    )  # fmt: skip
    if plan.treatment is not None:
        refuse_dtype(options.dtype, plan.treatment)
    plan.notices += note_other_base(checkpoint, loras)
    if plan.treatment is None or plan.treatment.is_plain:
        plan.notices += notices
    return plan


def _write(
    plan: Plan,
    target: Path,
    side_files: SideFiles,
    report: MergeReport,
    run: Run,
    repository: Repository | None,
    options: MergeOptions,
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
        if options.verify and shipment is None:
            from loratool.merging.proof.pairing import check_written

            check_written(plan.outputs, staged.path, run)
        report.verified = options.verify or shipment is not None
        plan.refuse_changed()
        result = {"subnormal": report.subnormal, "zeroed": report.zeroed}
        record = describe(plan, "merge", written.shards, result, held_by(plan.base))
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
