"""The files of a draft, written one tensor after the other: memory holds a few of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapters.dialects.writing import Draft
from loratool.dtypes import DTYPE_BITS
from loratool.errors import ValueRangeError
from loratool.storage.ggufwriting import write_gguf
from loratool.storage.header import build_header
from loratool.storage.jsonfile import write_json
from loratool.storage.outgoing import Outgoing
from loratool.storage.shardfile import ShardWriter
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, as_float32
from loratool.storage.torchwriting import write_torch
from loratool.storage.values import read_raw
from loratool.streams.progress import Progress
from loratool.streams.threads import computed


def draft_bytes(draft: Draft) -> int:
    """Bytes of its tensors."""
    return sum(t.numel * DTYPE_BITS[t.dtype] // 8 for t in draft.tensors.values())


def write_weights(
    draft: Draft, folder: Path, threads: int | None, progress: Progress | None
) -> None:
    """Write the weights of a draft into `folder`."""
    path = folder / draft.weights
    with FilePool() as files:
        pieces = _pieces(draft, files, threads, progress)
        # The writers take tensors in their order, each once.
        outgoing = {
            key: Outgoing(info.dtype, info.shape, lambda: [next(pieces)])
            for key, info in draft.tensors.items()
        }
        if draft.container == "gguf":
            write_gguf(path, draft.metadata, outgoing)
        elif draft.container == "torch":
            write_torch(path, _nested(outgoing, draft.within))
        else:
            _write_safetensors(path, outgoing, draft.metadata)
        pieces.close()


def write_documents(draft: Draft, folder: Path) -> None:
    """Write what a draft has beside its weights into `folder`."""
    for name, content in draft.documents.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content)


def _nested(content: dict[str, Any], within: Sequence[str]) -> dict[str, Any]:
    for name in reversed(within):
        content = {name: content}
    return content


def _pieces(
    draft: Draft, files: FilePool, threads: int | None, progress: Progress | None
) -> Generator[Bytes]:
    """The bytes of the tensors, in their order."""
    calls: list[Callable[[], Bytes]] = [
        partial(_read, key, info, files) for key, info in draft.tensors.items()
    ]
    for done, (key, data) in enumerate(
        zip(draft.tensors, computed(calls, threads), strict=True), 1
    ):
        yield data
        if progress is not None:
            progress(done, len(calls), key)


def _read(key: str, info: TensorInfo, files: FilePool) -> Bytes:
    """The bytes of a tensor. Raises ValueRangeError where they are not all numbers."""
    raw = read_raw(info, files)
    if info.is_float and not np.isfinite(as_float32(raw, info.dtype)).all():
        raise ValueRangeError(
            f"{key} holds NaN or infinity.",
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )
    return raw


def _write_safetensors(path: Path, tensors: dict[str, Outgoing], metadata: dict[str, str]) -> None:
    header = build_header([(key, t.dtype, t.shape) for key, t in tensors.items()], metadata)
    file = ShardWriter(path, header)
    try:
        start = 0
        for tensor in tensors.values():
            for position, piece in tensor.pieces():
                file.write(start + position, piece.data)
            start += tensor.nbytes
    finally:
        file.close()
