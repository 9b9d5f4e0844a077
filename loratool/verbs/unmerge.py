"""unmerge: take adapters out of a merged model again.

With the undo file of a reversible merge the base comes back bit for bit, and every tensor's sha256
is checked. Without it the deltas are subtracted and the result rounded once: near the base, but not
the base.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.reading import read_lora
from loratool.dtypes import MODEL_DTYPES, dtype_name
from loratool.errors import RestoreError, UsageError, explained_os_errors, listed
from loratool.merging.output import refuse_full_disk, side_files_of, write_index, write_model
from loratool.merging.plan import Plan
from loratool.merging.planning import build_plan
from loratool.merging.provenance import Merged, describe, identify, merged_into, read_record
from loratool.merging.subtraction import plan_subtraction, refuse_irreversible
from loratool.merging.undo.file import Undo, read_undo
from loratool.merging.undo.sidefiles import fetch_undo
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.notices import Notice
from loratool.storage.filenames import BEFORE, INDEX, PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.hashing import file_sha256
from loratool.storage.jsonfile import write_json
from loratool.storage.staging import StagedDirectory, check_output, explain, free_bytes
from loratool.streams.progress import Progress, counting
from loratool.verbs.inputs import as_list, check_dtype, check_paths, check_threads, check_weights


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
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        fields = {k: v for k, v in self.__dict__.items() if k != "warnings"}
        return {"schema_version": 1, **fields, "warnings": [w.to_dict() for w in self.warnings]}


@dataclass
class _Request:
    """The arguments of `unmerge`, opened and checked."""

    merged: Checkpoint
    record: dict[str, Any]
    adapters: list[Adapter]
    weights: list[float]
    target: Path
    dry_run: bool
    threads: int | None
    progress: Progress | None
    overwrite: bool
    #: The adapters that stay merged.
    remaining: list[Merged]
    notices: list[Notice]


def unmerge(
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    subtract: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
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
    dtype: of the result where it is subtracted; the base's by default, as far as it is known.
    subtract: do without the undo file.
    overwrite: replace an output that exists.
    dry_run: report only; nothing is written.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    RestoreError: adapters or weights that were not merged, a tensor that does not come out as it
        was, or what cannot be taken back without the undo file. FileError, AdapterError, BaseError,
        MatchError, OutputError as in `merge`.
    """
    started = time.perf_counter()
    sources = as_list(adapters)
    check_paths([merged, output], sources, "loratool unmerge MERGED ADAPTER -o OUT")
    check_threads(threads)
    if dtype is not None:
        check_dtype(dtype)
    factors = check_weights(weights, sources) if weights else None
    target = Path(output)
    with explained_os_errors():
        originals = [Path(base)] if base is not None else []
        check_output(target, [Path(merged), *originals, *map(Path, sources)], overwrite)
        checkpoint = open_checkpoint(merged)
        loras = [read_lora(source) for source in sources]
        checkpoint.fetch()
        checkpoint.folder.fetch([PROVENANCE])
        fetch_undo(checkpoint.folder)
        record = read_record(checkpoint.directory) if checkpoint.is_directory else None
        undo_path = checkpoint.directory / UNDO_FOLDER / UNDO
        undo = None
        if checkpoint.is_directory and undo_path.is_file() and not subtract:
            if record is None:
                raise RestoreError(
                    f"{merged}: its {PROVENANCE} is missing, which says what the undo file undoes.",
                    "Put it back. `--subtract` does without both, but not exactly.",
                )
            undo = read_undo(undo_path)
        elif record is not None and record.get("undo") and not subtract:
            raise RestoreError(
                f"{merged}: {UNDO_FOLDER}/{UNDO} is missing, which the reversible merge wrote.",
                "Put it back. `--subtract` does without it, but not exactly.",
            )
        inputs = [path.resolve() for path in (*checkpoint.files, *(a.weights for a in loras))]
        check_output(target, inputs, overwrite)
        for lora in loras:
            refuse_not_finite(lora)
        request = _Request(
            checkpoint, record or {}, loras, factors or [1.0] * len(loras), target, dry_run,
            threads, progress, overwrite, [], [],
        )  # fmt: skip
        if record is not None:
            _recognise(request, factors, undo is not None)
    if undo is not None:
        if dtype is not None:
            raise UsageError(
                "The undo file gives the base back in its own dtype.",
                "Leave --dtype out, or give --subtract too.",
            )
        if base is not None:
            text = f"{base} is not read: the undo file holds all that is missing."
            request.notices.append(Notice("base-not-needed", text))
        report = _restore(request, undo)
    else:
        report = _subtract(request, base, dtype)
    report.seconds = time.perf_counter() - started
    return report


def _recognise(request: _Request, weights: list[float] | None, exact: bool) -> None:
    """Put the adapters into the order of merging and take their weights from the record."""
    held = merged_into(request.merged.directory)
    # With the undo file, what the base held before stays where it was.
    earlier = merged_into(request.merged.directory, of_base=True)
    everything = held if exact else [*earlier, *held]
    if not everything:
        raise RestoreError(
            f"{request.merged.label}: by its {PROVENANCE} no adapter is merged into it.",
            "It may be what `unmerge` made; check the path.",
        )
    found = identify(request.adapters, everything, weights, earlier if exact else ())
    order = sorted(range(len(found)), key=lambda i: found[i])
    request.adapters = [request.adapters[i] for i in order]
    request.weights = [everything[found[i]].weight for i in order]
    request.remaining = [entry for i, entry in enumerate(everything) if i not in found]


# --------------------------------------------------------------------------- with the undo file


def _restore(request: _Request, undo: Undo) -> UnmergeReport:
    """Give the base back bit for bit."""
    merged = request.merged
    if request.remaining:
        raise RestoreError(
            f"{merged.label}: the undo file gives back what was before all its adapters were "
            f"merged. Not given:\n{listed(map(str, request.remaining))}",
            "Give all of them, then merge again what should stay: that is exact. To subtract "
            "the given ones alone, rounding again, use --subtract.",
        )
    options = request.record["options"]
    base = undo.base(merged.source)
    plan = build_plan(
        base,
        request.adapters,
        request.weights,
        options["dtype"],
        bool(options.get("allow_unmatched")),
    )
    _refuse_other_tensors(plan, merged, undo)
    report = _report(request, plan, base.nbytes)
    report.exact, report.dtype, report.undo_bytes = True, "base", undo.nbytes
    report.tensors, report.parameters = len(base.tensors), base.parameters
    report.shards = list(base.shards)
    report.side_files = sorted(undo.side_files)
    merged.folder.fetch(undo.side_files.keys() - undo.files.keys())
    report.warnings += _changed_side_files(merged.directory, undo)
    if request.dry_run:
        return report
    refuse_full_disk(base.nbytes, request.target)
    from loratool.merging.undo.restoring import restore  # torch: about two seconds to import

    with StagedDirectory(request.target, request.overwrite) as staged:
        try:
            progress = counting(request.progress, base.nbytes)
            restore(plan, merged, undo, staged.path, progress, request.threads)
            _write_side_files(undo, merged.directory, staged.path)
            if INDEX not in undo.files and len(undo.shards) > 1:
                places = {name: shard.file for shard in undo.shards for name in shard.tensors}
                write_index(staged.path, places, base.nbytes)
            before = merged.directory / UNDO_FOLDER / BEFORE
            if before.is_dir():
                shutil.copytree(before, staged.path, dirs_exist_ok=True)
            staged.commit()
        except OSError as error:
            raise explain(error, request.target) from error
    return report


def _refuse_other_tensors(plan: Plan, merged: Checkpoint, undo: Undo) -> None:
    """The undo file fits the tensors that the merge wrote, not a copy in another dtype."""
    wrong = []
    for job in plan.jobs:
        info = merged.tensors.get(job.name)
        if job.name not in undo.tensors or undo.tensors[job.name].whole:
            continue
        if info is None:
            wrong.append(f"{job.name} is missing")
        elif (info.dtype, info.shape) != (job.dtype, job.source.shape):
            wrong.append(f"{info}, but {job.dtype} {list(job.source.shape)} was written")
    if wrong:
        raise RestoreError(
            f"{merged.label} is not as the merge wrote it:\n{listed(wrong)}",
            "Use the directory that `loratool merge --reversible` wrote. `--subtract` does "
            "without the undo file, but not exactly.",
        )


def _changed_side_files(directory: Path, undo: Undo) -> list[Notice]:
    changed = []
    for name, digest in undo.side_files.items():
        path = directory / name
        if name not in undo.files and not (path.is_file() and file_sha256(path) == digest):
            changed.append(f"{name} ({'changed' if path.is_file() else 'missing'})")
    if not changed:
        return []
    text = f"Files beside the weights are not as in the base and stay so: {', '.join(changed)}."
    return [Notice("side-file-changed", text)]


def _write_side_files(undo: Undo, source: Path, folder: Path) -> None:
    for name in undo.side_files.keys() | undo.files.keys():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in undo.files:
            target.write_bytes(undo.files[name])
        elif (source / name).is_file():
            shutil.copyfile(source / name, target)


# ----------------------------------------------------------------------------- by subtraction


def _subtract(request: _Request, base: str | Path | None, dtype: str | None) -> UnmergeReport:
    """Subtract the deltas and round once."""
    merged, record = request.merged, request.record
    if not record:
        request.notices.append(
            Notice(
                "no-provenance",
                f"{merged.label} has no {PROVENANCE}: nothing says that these adapters were "
                "merged into it, or with which weights. `loratool verify` can tell, with the base.",
            )
        )
    if dtype is None:
        known = record["base"].get("dtypes", []) if record else []
        only = dtype_name(known[0]) if len(known) == 1 else "base"
        dtype = only if only in MODEL_DTYPES else "base"
    found = plan_subtraction(
        merged, request.adapters, request.weights, dtype, base, record, request.threads
    )
    plan = found.plan
    refuse_irreversible(found, record)
    report = _report(request, plan, plan.bytes_to_write)
    report.dtype, report.copied_from_base = dtype, len(found.originals)
    from loratool.merging.undo.sampling import (
        changed_by_cycle,  # torch: about two seconds to import
    )

    adapted = sum(job.source.numel for job in found.forward.jobs if job.is_arithmetic)
    subtracted = sum(job.source.numel for job in plan.jobs if job.is_arithmetic)
    share = subtracted / max(1, adapted)
    report.expected_changed = share * changed_by_cycle(found.forward, plan)
    report.exact = len(found.originals) == len(plan.jobs) and not request.remaining
    files = side_files_of(merged)
    files.fetch()
    report.side_files = sorted(files.copied)
    if request.dry_run:
        return report
    refuse_full_disk(plan.bytes_to_write + files.nbytes, request.target)
    with StagedDirectory(request.target, request.overwrite) as staged:
        try:
            written = write_model(plan, staged.path, files, request.progress, request.threads)
            document = describe(plan, "unmerge", written.shards, {})
            document["removed"] = document["adapters"]
            document["adapters"] = [entry.document for entry in request.remaining]
            document["base"]["adapters"] = []
            write_json(staged.path / PROVENANCE, document)
            staged.commit()
        except OSError as error:
            raise explain(error, request.target) from error
    return report


def _report(request: _Request, plan: Plan, nbytes: int) -> UnmergeReport:
    return UnmergeReport(
        merged=request.merged.label,
        adapters=[a.label for a in request.adapters],
        weights=request.weights,
        output=str(request.target),
        exact=False,
        dtype=plan.dtype,
        dry_run=request.dry_run,
        shards=list(plan.shards),
        modules=plan.modules,
        tensors=len(plan.jobs),
        parameters=sum(job.source.numel for job in plan.jobs),
        bytes_written=nbytes,
        bytes_free=free_bytes(request.target),
        undo_bytes=0,
        remaining=[str(entry) for entry in request.remaining],
        warnings=[*request.notices, *plan.notices],
    )
