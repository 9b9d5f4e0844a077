"""The base as an undo file describes it: a checkpoint of headers, from which plans are made again.

Of its data only what the undo file holds whole can be read. That is enough to tell how the weights
of a quantised base were stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

from loratool.errors import FileError
from loratool.merging.undo.file import BaseTensor, Undo
from loratool.models.checkpoint import Checkpoint, config_in
from loratool.models.quantised.base import dequantised
from loratool.storage.folder import Folder
from loratool.storage.stamps import Stamp
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import Values, read_raw, values_of


def kept_base(undo: Undo, merged: Checkpoint) -> Checkpoint:
    """The base that `merged` was made from: names, dtypes, shapes, shards and config.

    Raises BaseError for a quantised one of a kind that is not read.
    """
    tensors = {name: _info(undo, tensor) for name, tensor in undo.tensors.items()}
    folder = _BaseFolder(undo, merged, list(tensors.values()))
    config = config_in(folder, tensors)
    shards = {shard.file: list(shard.tensors) for shard in undo.shards}
    base = Checkpoint(merged.source, folder, config, tensors, shards, undo.metadata)
    return dequantised(base) if undo.is_quantised else base


@dataclass(frozen=True)
class _KeptTensor(TensorInfo):
    """A tensor that lies in an undo file itself."""

    undo: Undo | None = field(default=None, compare=False, repr=False)


def _info(undo: Undo, tensor: BaseTensor) -> TensorInfo:
    info = tensor.info
    if not tensor.whole:
        return info
    return _KeptTensor(info.name, info.dtype, info.shape, info.file, info.start, undo=undo)


class _Kept(Values):
    """Elements of such a tensor; the piece that was read last is at hand."""

    def __init__(self, info: _KeptTensor, files: FilePool) -> None:
        super().__init__(info)
        assert info.undo is not None
        self._undo, self._files = info.undo, files
        self._step = info.undo.tensors[info.name].step
        self._lock = threading.Lock()
        self._piece: tuple[int, Bytes] | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        size, done = self.info.itemsize, 0
        while low < high:
            begin = low - low % self._step
            piece = self._read(begin)[(low - begin) * size : (high - begin) * size]
            raw[done : done + len(piece)] = piece
            done, low = done + len(piece), begin + self._step

    def _read(self, begin: int) -> Bytes:
        with self._lock:
            if self._piece is None or self._piece[0] != begin:
                self._piece = begin, self._undo.whole(self.info.name, begin, self._files)
            return self._piece[1]


@values_of.register
def _(info: _KeptTensor, files: FilePool) -> Values:
    return _Kept(info, files)


class _BaseFolder(Folder):
    """The folder of the base, of which some files are in the undo file and others in the output.

    Its weights are one file, of which whole tensors are read, from whichever has them.
    """

    def __init__(self, undo: Undo, merged: Checkpoint, tensors: Sequence[TensorInfo]) -> None:
        super().__init__(merged.source)
        self._undo, self._merged = undo, merged
        self._at = {info.start: info for info in tensors if info.nbytes}

    def has(self, name: str) -> bool:
        kept = name in self._undo.files
        return kept or (name in self._undo.side_files and super().has(name))

    def json(self, name: str) -> dict[str, Any]:
        if name not in self._undo.files:
            return super().json(name)
        found = self._undo.json(name)
        if not isinstance(found, dict):
            raise FileError(
                f"{self._undo.path}: the base's {name} in it is no JSON object.", "Fetch it again."
            )
        return found

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[BinaryIO, int, Stamp | None]]:
        if name in self._undo.files:
            content = self._undo.files[name]
            yield BytesIO(content), len(content), None
        else:
            with super().reading(name) as found:
                yield found

    def ranges(self, name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._held(start) for start, _ in places]

    def _held(self, start: int) -> bytes:
        info = self._at[start]
        there = info if isinstance(info, _KeptTensor) else self._merged.tensors[info.name]
        return read_raw(there).tobytes()
