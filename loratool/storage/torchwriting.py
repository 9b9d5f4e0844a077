"""Writing torch files without torch, and without holding more than a piece of a tensor.

The pickle and the place of every byte follow from names, dtypes and shapes, so the storages are
streamed behind it. `torch.load` reads the result with `weights_only` and with `mmap`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loratool.errors import FileError
from loratool.storage.archivewriting import Slot, directory, entry_header, slots
from loratool.storage.outgoing import Outgoing
from loratool.storage.shardfile import ShardWriter
from loratool.storage.statedict import STORAGES

#: Of 8-bit floats torch has these names for readers of old files only.
_STORAGE_OF = {d: name for name, d in STORAGES.items() if not name.startswith("Float8")}

#: Where the data of a storage begins, as in files of torch: at multiples of a line of the cache.
_ALIGNMENT = 64

#: The folder that torch puts everything in, and the version of the layout.
_FOLDER = "archive"
_VERSION = b"3\n"

#: Opcodes, by the names that Python's pickle.py has for them.
_PROTO_2, _STOP = b"\x80\x02", b"."
_EMPTY_DICT, _MARK, _SETITEMS = b"}", b"(", b"u"
_TUPLE, _EMPTY_TUPLE, _REDUCE, _BINPERSID = b"t", b")", b"R", b"Q"
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"


class TorchLayout(NamedTuple):
    """The entries of a file, and what each of them holds."""

    entries: list[Slot]
    held: list[Outgoing]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.entries[-1].end + len(directory(self.entries, [0] * len(self.entries)))


def torch_layout(content: Mapping[str, Any]) -> TorchLayout:
    """What lies where in a file of `content`: tables by name of `Outgoing` tensors, of tables, and
    of texts, numbers, truths and None.

    Raises FileError for a dtype that is not written.
    """
    pickle = _Pickle(content)
    held = {"data.pkl": _raw(pickle.whole), "byteorder": _raw(b"little")}
    held |= {f"data/{key}": tensor for key, tensor in enumerate(pickle.tensors)}
    held["version"] = _raw(_VERSION)
    sizes = [(f"{_FOLDER}/{name}", one.nbytes) for name, one in held.items()]
    return TorchLayout(slots(sizes, _ALIGNMENT), list(held.values()))


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write a new file of `content`, see `torch_layout`."""
    entries, held = torch_layout(content)
    file = ShardWriter(path, b"")
    crcs = []
    try:
        for slot, one in zip(entries, held, strict=True):
            crc = 0
            for position, piece in one.pieces():
                file.write(slot.data + position, piece.data)
                crc = zlib.crc32(piece.data, crc)
            file.write(slot.place, memoryview(entry_header(slot, crc)))
            crcs.append(crc)
        file.write(entries[-1].end, memoryview(directory(entries, crcs)))
    finally:
        file.close()


def _raw(content: bytes) -> Outgoing:
    return Outgoing("U8", (len(content),), lambda: [np.frombuffer(content, np.uint8)])


class _Pickle:
    """A pickle of protocol 2 that names tensors by their position in `tensors`."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.tensors: list[Outgoing] = []
        self._known: dict[bytes, bytes] = {}
        self._parts: list[bytes] = [_PROTO_2]
        self._put(content)
        self.whole = b"".join([*self._parts, _STOP])

    def _put(self, value: Any) -> None:
        if isinstance(value, Outgoing):  # it is a tuple too
            self._parts.append(self._tensor(value))
        elif isinstance(value, Mapping):
            self._parts += [_EMPTY_DICT, _MARK]
            for key, item in value.items():
                self._parts.append(_text(key))
                self._put(item)
            self._parts.append(_SETITEMS)
        else:
            self._parts.append(_plain(value))

    def _tensor(self, tensor: Outgoing) -> bytes:
        """As `_rebuild_tensor_v2` takes it: storage, offset, shape, strides, gradient, hooks."""
        if tensor.dtype not in _STORAGE_OF:
            raise FileError(
                f"A tensor of dtype {tensor.dtype} cannot be written into a torch file.",
                "Write it as float32: --dtype float32.",
            )
        numel = math.prod(tensor.shape)
        rows = [max(1, count) for count in tensor.shape]
        strides = [math.prod(rows[axis + 1 :]) for axis in range(len(rows))]
        storage = [
            self._once(_text("storage")), self._name("torch", _STORAGE_OF[tensor.dtype]),
            _text(str(len(self.tensors))), self._once(_text("cpu")), _plain(numel),
        ]  # fmt: skip
        self.tensors.append(tensor)
        hooks = self._name("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE
        arguments = [
            _tuple(storage) + _BINPERSID, _plain(0), _tuple(map(_plain, tensor.shape)),
            _tuple(map(_plain, strides)), _FALSE, hooks,
        ]  # fmt: skip
        return self._name("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + _REDUCE

    def _name(self, module: str, name: str) -> bytes:
        return self._once(f"c{module}\n{name}\n".encode())

    def _once(self, value: bytes) -> bytes:
        """A value that comes again and again: in the memo from the first time on."""
        if value in self._known:
            return self._known[value]
        index = struct.pack("<B", len(self._known))
        self._known[value] = b"h" + index
        return value + b"q" + index


def _tuple(items: Iterable[bytes]) -> bytes:
    raw = b"".join(items)
    return _MARK + raw + _TUPLE if raw else _EMPTY_TUPLE


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _plain(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return _NONE if value is None else _TRUE if value else _FALSE
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} is no plain value")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
