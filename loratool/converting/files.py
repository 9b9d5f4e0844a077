"""The files of a draft, written one tensor after the other: memory holds a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from loratool.adapters.dialects.writing import Draft
from loratool.dtypes import DTYPE_BITS
from loratool.storage.header import build_header
from loratool.storage.jsonfile import write_json
from loratool.storage.shardfile import ShardWriter
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import read_raw
from loratool.streams.progress import Progress
from loratool.streams.threads import computed


def draft_bytes(draft: Draft) -> int:
    """Bytes of its tensors."""
    return sum(t.numel * DTYPE_BITS[t.dtype] // 8 for t in draft.tensors.values())


def write_draft(draft: Draft, folder: Path, threads: int | None, progress: Progress | None) -> None:
    """Write the files of a draft into `folder`."""
    path = folder / draft.weights
    entries = [(key, t.dtype, t.shape) for key, t in draft.tensors.items()]
    with FilePool() as files:
        pieces = _pieces(draft, files, threads, progress)
        if draft.container == "safetensors":
            _write_placed(path, build_header(entries, draft.metadata), pieces)
        else:
            raise NotImplementedError(draft.container)
    for name, content in draft.documents.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content)


def _pieces(
    draft: Draft, files: FilePool, threads: int | None, progress: Progress | None
) -> Iterator[Bytes]:
    """The bytes of the tensors, in their order."""
    calls: list[Callable[[], Bytes]] = [
        partial(_read, info, files) for info in draft.tensors.values()
    ]
    for done, (key, data) in enumerate(
        zip(draft.tensors, computed(calls, threads), strict=True), 1
    ):
        yield data
        if progress is not None:
            progress(done, len(calls), key)


def _read(info: TensorInfo, files: FilePool) -> Bytes:
    return read_raw(info, files)


def _write_placed(path: Path, header: bytes, pieces: Iterator[Bytes]) -> None:
    file = ShardWriter(path, header)
    try:
        position = 0
        for data in pieces:
            file.write(position, data.data)
            position += data.nbytes
        file.flush_and_close()
    finally:
        file.close()
