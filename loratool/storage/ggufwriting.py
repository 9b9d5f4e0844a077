"""Writing GGUF files: a header whose every byte is known beforehand, then tensor after tensor."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loratool.errors import FileError
from loratool.storage.ggml import PLAIN
from loratool.storage.gguf import ALIGNMENT, GGUF_TYPES, USUAL_ALIGNMENT
from loratool.storage.kinds import GGUF_MAGIC
from loratool.storage.outgoing import Outgoing
from loratool.storage.shardfile import ShardWriter

_VERSION = 3
_NUMBERS = {name: number for number, (name, _) in GGUF_TYPES.items()}
_KINDS = {code: number for number, code in PLAIN.items()}

#: What ggml has room for (GGML_MAX_NAME, with a zero at its end, and GGML_MAX_DIMS).
_LONGEST_NAME = 63
_MOST_AXES = 4


class TypedValue(NamedTuple):
    """A value by the name of its type in GGUF, "float32"; arrays of such have "float32[]"."""

    kind: str
    value: Any


class GgufLayout(NamedTuple):
    """`offsets` count from the end of the header, where the data begins, by name; `nbytes` are
    those of the data, with what fills it up."""

    header: bytes
    offsets: dict[str, int]
    nbytes: int
    alignment: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.nbytes


def gguf_layout(values: Mapping[str, TypedValue], tensors: Mapping[str, Outgoing]) -> GgufLayout:
    """What lies where in a file of these values and tensors, in this order.

    Raises FileError for a tensor that ggml cannot hold.
    """
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else USUAL_ALIGNMENT
    parts = [GGUF_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(values))]
    for key, (kind, value) in values.items():
        parts += [_text(key), _typed(kind, value)]
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        _check(name, tensor)
        offsets[name] = end
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        parts += [_text(name), axes, struct.pack("<IQ", _KINDS[tensor.dtype], end)]
        end = _filled(end + tensor.nbytes, alignment)
    content = b"".join(parts)
    header = content.ljust(_filled(len(content), alignment), b"\0")
    return GgufLayout(header, offsets, end, alignment)


def write_gguf(
    path: Path, values: Mapping[str, TypedValue], tensors: Mapping[str, Outgoing]
) -> None:
    """Write a new file, in memory of one piece of a tensor. Raises FileError as `gguf_layout`."""
    layout = gguf_layout(values, tensors)
    file = ShardWriter(path, layout.header)
    try:
        for name, tensor in tensors.items():
            start = layout.offsets[name]
            for position, piece in tensor.pieces():
                file.write(start + position, piece.data)
            end = start + tensor.nbytes
            file.write(end, memoryview(bytes(_filled(end, layout.alignment) - end)))
    finally:
        file.close()


def _filled(position: int, alignment: int) -> int:
    """The next place where a tensor may begin."""
    return -(-position // alignment) * alignment


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(kind: str, value: Any) -> bytes:
    """A value behind the number of its type."""
    item = kind.removesuffix("[]")
    number = struct.pack("<I", _NUMBERS[item])
    if item == kind:
        return number + _plain(item, value)
    items = b"".join(_plain(item, one) for one in value)
    return struct.pack("<I", _NUMBERS["array"]) + number + struct.pack("<Q", len(value)) + items


def _plain(kind: str, value: Any) -> bytes:
    if kind == "string":
        return _text(value)
    return struct.pack("<" + GGUF_TYPES[_NUMBERS[kind]][1], value)


def _check(name: str, tensor: Outgoing) -> None:
    if tensor.dtype not in _KINDS:
        raise FileError(
            f"{name}: GGUF has no dtype {tensor.dtype}.", "Write it as float32: --dtype float32."
        )
    length, axes = len(name.encode()), len(tensor.shape)
    if length > _LONGEST_NAME or axes > _MOST_AXES:
        raise FileError(
            f"{name}: llama.cpp reads names of at most {_LONGEST_NAME} bytes and tensors of at "
            f"most {_MOST_AXES} axes; this is of {length} and {axes}.",
            "Choose another form of the adapter.",
        )
