"""What lies beside the shards that a plan makes: index, config and tokenizer."""

from __future__ import annotations

from pathlib import Path

from loratool.merging.plan import Plan
from loratool.models.sidefiles import SideFiles, write_side_files
from loratool.storage.filenames import INDEX, needs_index
from loratool.storage.jsonfile import write_json


def write_beside(plan: Plan, folder: Path, files: SideFiles) -> None:
    """Write what a model has beside its shards into `folder`: config, tokenizer, index."""
    write_side_files(files, folder, plan.dtype, plan.config_changes, plan.rewriting)
    if needs_index(plan.shards):
        weight_map = {job.name: shard for shard, jobs in plan.shards.items() for job in jobs}
        write_index(folder, weight_map, plan.bytes_to_write)


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Write which tensor lies in which shard; `total` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
