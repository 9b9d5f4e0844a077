"""The model directory that a plan makes: shards, index, config and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.merging.plan import Plan
from loratool.models.sidefiles import SideFiles, write_side_files
from loratool.storage.filenames import INDEX, needs_index
from loratool.storage.jsonfile import write_json
from loratool.streams.run import Run

if TYPE_CHECKING:
    from loratool.merging.executor import Courier, Recorder, Written


def write_model(
    plan: Plan,
    folder: Path,
    files: SideFiles,
    run: Run,
    recorder: Recorder | None = None,
    courier: Courier | None = None,
) -> Written:
    """Write everything but the provenance into `folder`; a `courier` takes shards from there."""
    from loratool.merging.executor import execute  # torch: about two seconds to import

    written = execute(plan.outputs, folder, run, recorder, courier)
    write_side_files(files, folder, plan.dtype, plan.config_changes, plan.rewriting)
    if needs_index(plan.shards):
        weight_map = {job.name: shard for shard, jobs in plan.shards.items() for job in jobs}
        write_index(folder, weight_map, plan.bytes_to_write)
    return written


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Write which tensor lies in which shard; `total` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
