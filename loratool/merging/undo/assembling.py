"""Make the undo file of the parts that were recorded with each shard: see `undo.file`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loratool.merging.plan import Plan
from loratool.merging.undo.predicted import predicted_jobs
from loratool.merging.undo.recording import finish_row, new_row
from loratool.merging.undo.residual import compress, encode_whole
from loratool.merging.undo.sidefiles import Kept
from loratool.merging.undo.writer import UndoWriter
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import as_stored
from loratool.storage.hashing import Hasher, digest_of
from loratool.storage.header import header_bytes, read_header
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, block_elements, blocks
from loratool.storage.values import values_of
from loratool.streams.run import Run
from loratool.streams.workers import BLOCKS_PER_TASK, Workers

#: Bytes of a part that are copied together.
_PIECE = 1 << 22


def assemble(plan: Plan, kept: Kept, recorded: Mapping[str, Any], parts: Path, run: Run) -> int:
    """Write the undo file of a merge; returns its bytes.

    `recorded` is what was noted of each shard, whose parts are in the folder `parts`. Tensors that
    no shard begins with are read from the base.
    """
    base, of_base = as_stored(plan.base), predicted_jobs(plan)
    headers = dict(_headers(base))
    writer = UndoWriter(kept.path, _entries(base, of_base, headers, kept))
    try:
        table: dict[str, dict[str, Any]] = {}
        for shard in plan.shards:
            table |= recorded[shard]["tensors"]
            _copy(parts / f"{shard}.undo", recorded[shard]["entries"], writer)
        rest = [info for name, info in base.tensors.items() if name not in table]
        with FilePool() as files, Workers(run.threads) as workers:
            for info in rest:
                table[info.name] = _store_whole(info, files, workers, writer)
        for file, header in headers.items():
            writer.append(f"header:{file}", compress(header))
        for name, content in kept.files.items():
            writer.append(f"file:{name}", compress(content))
        document: dict[str, Any] = {
            "tensors": {name: table[name] for name in base.tensors},
            "shards": [
                {"file": _file_name(base, shard), "tensors": names}
                for shard, names in base.shards.items()
            ],
            "side_files": kept.hashes,
            "files": {name: digest_of(content) for name, content in kept.files.items()},
            "headers": {name: digest_of(header) for name, header in headers.items()},
        }
        if base is not plan.base:
            document |= {"quantised": True, "metadata": base.metadata}
        return writer.finish(document)
    finally:
        writer.close()


def _entries(
    base: Checkpoint, of_base: Mapping[str, Any], headers: Mapping[str, bytes], kept: Kept
) -> list[str]:
    """The names of all entries that the undo file may get."""
    names = [f"residual:{n}" for n, (job, of) in of_base.items() if not of.is_copied(job)]
    names += [f"whole:{name}" for name in base.tensors if name not in of_base]
    for name, (job, _) in of_base.items():
        names += [f"gain:{name}:{i}" for i, d in enumerate(job.deltas) if d.factors.magnitude]
        names += [f"taken:{name}:{i}" for i in range(len(job.taken))]
    names += [f"header:{file}" for file in headers]
    return names + [f"file:{name}" for name in kept.files]


def _copy(part: Path, entries: list[tuple[str, int]], writer: UndoWriter) -> None:
    with part.open("rb") as stream:
        for entry, left in entries:
            while left:
                data = stream.read(min(left, _PIECE))
                if not data:
                    raise OSError(f"{part}: it is shorter than it was")
                writer.append(entry, data)
                left -= len(data)


def _store_whole(
    info: TensorInfo, files: FilePool, workers: Workers, writer: UndoWriter
) -> dict[str, Any]:
    """Store a tensor itself, because no job begins with it, or it has no elements."""
    step = BLOCKS_PER_TASK * block_elements()
    row = {**new_row(info, step), "whole": True}
    hasher, values = Hasher(), values_of(info, files)

    def piece(low: int, high: int) -> tuple[Bytes, bytes]:
        raw = values.bytes(low, high)
        return raw, encode_whole(raw, info.itemsize)

    calls = (partial(piece, low, high) for low, high in blocks(info.numel, step))
    for raw, chunk in workers.in_order(calls):
        hasher.update(raw)
        row["sizes"].append(len(chunk))
        writer.append(f"whole:{info.name}", chunk)
    finish_row(row, hasher)
    return row


def _headers(base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """The first bytes of each base shard that can be written again as it was.

    Torch files cannot, nor files with tensors that the index places elsewhere; their tensors come
    back, in a file with a header of our own.
    """
    for shard, names in base.shards.items():
        path = _path(base, names)
        if path.suffix == ".safetensors" and list(read_header(path)[0]) == names:
            yield _file_name(base, shard), header_bytes(path)


def _file_name(base: Checkpoint, shard: str) -> str:
    """What the restored shard is called: as in the base, unless that was a torch file."""
    path = _path(base, base.shards[shard])
    return path.name if path.suffix == ".safetensors" else shard


def _path(base: Checkpoint, names: list[str]) -> Path:
    return base.tensors[names[0]].file
