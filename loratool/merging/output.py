"""The model directory that a plan makes: shards, index, config and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.errors import OutputError, explained_os_errors
from loratool.merging.plan import Plan
from loratool.models.checkpoint import Checkpoint
from loratool.models.sidefiles import SideFiles, collect, write_side_files
from loratool.storage.filenames import INDEX, MODEL
from loratool.storage.jsonfile import write_json
from loratool.storage.staging import free_bytes
from loratool.streams.progress import Progress, counting
from loratool.words import format_bytes

if TYPE_CHECKING:
    from loratool.merging.executor import Courier, Written
    from loratool.merging.undo.recording import Recorder


def side_files_of(checkpoint: Checkpoint, adapters: Sequence[Adapter] = ()) -> SideFiles:
    """What lies beside the weights of `checkpoint`, with the adapters' tokenizers on top.

    Raises FileError for a file that cannot be read.
    """
    names = {path.name for path in checkpoint.files}
    names |= {name for name in checkpoint.folder.names(depth=0) if name.endswith(".index.json")}
    with explained_os_errors():
        found = collect(
            checkpoint.folder, names, [a.folder for a in adapters], checkpoint.is_directory
        )
        found.check_readable()
    return found


def refuse_full_disk(needed: int, target: Path) -> None:
    free = free_bytes(target)
    if needed > free:
        raise OutputError(
            f"The output needs {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free at {target.absolute().parent}.",
            "Free some space, or write to another disk.",
        )


def write_model(
    plan: Plan,
    folder: Path,
    files: SideFiles,
    progress: Progress | None,
    threads: int | None,
    recorder: Recorder | None = None,
    courier: Courier | None = None,
) -> Written:
    """Write everything but the provenance into `folder`; a `courier` takes shards from there."""
    from loratool.merging.executor import execute  # torch: about two seconds to import

    advance = counting(progress, plan.bytes_to_write)
    written = execute(plan, folder, advance, threads, recorder, courier)
    write_side_files(files, folder, plan.dtype, plan.config_changes)
    if list(plan.shards) != [MODEL]:
        weight_map = {job.name: shard for shard, jobs in plan.shards.items() for job in jobs}
        write_index(folder, weight_map, plan.bytes_to_write)
    return written


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Write which tensor lies in which shard; `total` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
