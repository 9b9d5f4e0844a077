"""merge: write `W + Σ weight·scale·B·A` for every tensor of a base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, Notice
from loratool.checkpoint.base import open_checkpoint
from loratool.checkpoint.sidefiles import SideFiles, collect, write_side_files
from loratool.checkpoint.tensors import FilePool, format_bytes, read_float32
from loratool.checkpoint.writer import StagedDirectory, check_output, explain, free_bytes
from loratool.errors import (
    OutputError,
    UsageError,
    ValueRangeError,
    explained_os_errors,
    listed,
    nearest,
)
from loratool.formats import read_lora
from loratool.plan import DTYPES, Plan
from loratool.planning import build_plan
from loratool.provenance import PROVENANCE, describe, write_json

#: `progress(bytes_done, bytes_total, label)`, called as the output grows.
Progress = Callable[[int, int, str], None]


@dataclass
class MergeReport:
    """What a merge did, or with `dry_run` would do. Sizes are bytes, times seconds."""

    base: str
    adapters: list[str]
    weights: list[float]
    output: str
    dtype: str
    dry_run: bool
    shards: list[str]
    modules: int
    tensors: dict[str, int]
    parameters: int
    bytes_to_read: int
    bytes_written: int
    bytes_needed: int
    bytes_free: int
    changes: dict[str, list[str]]
    config_changes: dict[str, Any]
    side_files: list[str]
    left_out: list[str]
    warnings: list[Notice] = field(default_factory=list)
    subnormal: int = 0
    zeroed: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        fields = {k: v for k, v in self.__dict__.items() if k != "warnings"}
        return {"schema_version": 1, **fields, "warnings": [w.to_dict() for w in self.warnings]}


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "float16",
    allow_unmatched: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge LoRA adapters into a base model on disk, streaming, and write the result to `output`.

    Parameters
    ----------
    base: model directory (safetensors or pytorch_model.bin, sharded or not), or one weights file.
    adapters: PEFT adapter directory or file, or several of them.
    output: directory to make; it appears complete or not at all.
    weights: one factor per adapter, of any sign; 1.0 each if not given.
    dtype: "float16", "bfloat16" or "float32" for all floating tensors, or "base" to keep each
        tensor's own. Arithmetic is float32 (float64 for float64 tensors), rounded once.
    allow_unmatched: merge what fits when parts of an adapter do not, and record the rest.
    overwrite: replace an output that exists.
    dry_run: plan and report only; nothing is written.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    FileError, AdapterError, BaseError, MatchError: the inputs do not allow an honest merge.
    ValueRangeError: NaN, infinity or overflow. OutputError: the output cannot be written.
    """
    started = time.perf_counter()
    sources = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot work.", "Give a number above zero.")
    factors = _check_arguments(base, sources, output, weights, dtype)
    target = Path(output)
    inputs = [Path(base), *map(Path, sources)]
    with explained_os_errors():
        check_output(target, inputs, overwrite)
        checkpoint = open_checkpoint(base)
        loras = [read_lora(source) for source in sources]
    # What the inputs link to (as files in a download cache do) must not be written to either.
    files = [path.resolve() for path in (*checkpoint.files, *(a.weights for a in loras))]
    check_output(target, files, overwrite)
    plan = build_plan(checkpoint, loras, factors, dtype, allow_unmatched)
    folders = [a.source if a.source.is_dir() else a.weights.parent for a in loras]
    index = {p.name for p in checkpoint.directory.glob("*.index.json")}
    names = {path.name for path in checkpoint.files} | index
    with explained_os_errors():
        side_files = collect(checkpoint.directory, names, folders, checkpoint.source.is_dir())
    report = _report(plan, target, side_files, dry_run)
    with explained_os_errors():
        for lora in loras:
            _refuse_not_finite(lora)
        side_files.check_readable()
    if dry_run:
        return report
    if report.bytes_needed > report.bytes_free:
        raise OutputError(
            f"The output needs {format_bytes(report.bytes_needed)}, but only "
            f"{format_bytes(report.bytes_free)} are free at {target.absolute().parent}.",
            "Free some space, or write to another disk.",
        )
    with StagedDirectory(target, overwrite) as staged:
        try:
            _write(plan, staged.path, side_files, report, threads, progress)
            staged.commit()
        except OSError as error:
            raise explain(error, target) from error
    report.seconds = time.perf_counter() - started
    return report


def _check_arguments(
    base: str | Path,
    sources: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None,
    dtype: str,
) -> list[float]:
    if not all(str(path) for path in (base, output, *sources)):
        raise UsageError("A path is empty.", "Check the variables in your command.")
    if not sources:
        raise UsageError("No adapter given.", "loratool merge BASE ADAPTER -o OUT")
    if dtype not in DTYPES:
        near = nearest(dtype, DTYPES)
        raise UsageError(
            f"Unknown dtype {dtype!r}.",
            (f"Did you mean {near}? " if near else "") + f"Choose among {', '.join(DTYPES)}.",
        )
    try:
        factors = [float(w) for w in weights] if weights else [1.0] * len(sources)
    except (TypeError, ValueError):
        raise UsageError(f"The weights {weights!r} are not numbers.", "Give numbers.") from None
    if len(factors) != len(sources):
        raise UsageError(
            f"{len(factors)} weights for {len(sources)} adapters.",
            "Give --weight once per adapter, in their order.",
        )
    if not all(np.isfinite(factors)):
        raise UsageError(f"The weights {factors} are not all finite.", "Give plain numbers.")
    return factors


def _report(plan: Plan, target: Path, files: SideFiles, dry_run: bool) -> MergeReport:
    changes: dict[str, list[str]] = {"merge": [], "replace": [], "add": []}
    for job in plan.jobs:
        if job.action in changes:
            changes[job.action].append(job.name)
    return MergeReport(
        base=str(plan.base.source),
        adapters=[str(a.source) for a in plan.adapters],
        weights=plan.weights,
        output=str(target),
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
        changes=changes,
        config_changes=plan.config_changes,
        side_files=sorted(files.copied),
        left_out=files.left_out,
        warnings=plan.notices,
    )


def _refuse_not_finite(adapter: Adapter) -> None:
    """Raise before anything is written if an adapter holds NaN or infinity."""
    broken = []
    with FilePool() as files:
        for name, info in adapter.tensors.items():
            if info.is_float and name not in adapter.inert:
                count = int((~np.isfinite(read_float32(info, files))).sum())
                if count:
                    broken.append(f"{name}: {count} of {info.numel} values")
    if broken:
        raise ValueRangeError(
            f"{adapter.weights}: {len(broken)} tensors hold NaN or infinity:\n{listed(broken)}",
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )


def _write(
    plan: Plan,
    folder: Path,
    files: SideFiles,
    report: MergeReport,
    threads: int | None,
    progress: Progress | None,
) -> None:
    from loratool.executor import execute  # torch: about two seconds to import

    done = 0

    def advance(count: int, label: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, report.bytes_written, label)

    written = execute(plan, folder, advance, threads)
    write_side_files(files, folder, plan.dtype, plan.config_changes)
    if list(plan.shards) != ["model.safetensors"]:
        write_json(folder / "model.safetensors.index.json", _index(plan))
    report.subnormal, report.zeroed = written.counts.subnormal, written.counts.zeroed
    result = {"subnormal": report.subnormal, "zeroed": report.zeroed}
    write_json(folder / PROVENANCE, describe(plan, "merge", written.shards, result))


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {job.name: shard for shard, jobs in plan.shards.items() for job in jobs}
    return {
        "metadata": {"total_size": plan.bytes_to_write},
        "weight_map": dict(sorted(weight_map.items())),
    }
