"""The header of a GGUF file, the container of llama.cpp, read with suspicion.

Layout (ggml's docs/gguf.md), little-endian: the magic, a version, how many tensors and how many
values there are; the values by key, of one of 13 types; name, shape, type and offset of each
tensor; and, from the next multiple of the alignment on, their data. Shapes are written last axis
first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loratool.errors import FileError, TruncatedError
from loratool.storage.bounded import LONGEST_LIST, LONGEST_NAME, MOST_AXES, Cursor, Malformed
from loratool.storage.ggml import BLOCKS, PLAIN, in_blocks
from loratool.storage.kinds import GGUF_MAGIC, LOOKED_AT, refuse_known_impostors
from loratool.storage.stamps import Stamp
from loratool.storage.tensors import TensorInfo
from loratool.words import counted, format_bytes

#: What a file begins with that is one.

#: Where the alignment of the data stands among the values, and what it is without one.
ALIGNMENT = "general.alignment"
USUAL_ALIGNMENT = 32

#: Types of values by their number, with the form that `struct` has for those that are numbers.
GGUF_TYPES = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"),
    4: ("uint32", "I"), 5: ("int32", "i"), 6: ("float32", "f"), 7: ("bool", "?"),
    8: ("string", ""), 9: ("array", ""), 10: ("uint64", "Q"), 11: ("int64", "q"),
    12: ("float64", "d"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

#: Elements of all arrays together. The vocabulary of a model of today has less: 262,144 tokens with
#: a score, a type and two merges each.
_MOST_ELEMENTS = 2_000_000
#: Arrays inside each other. No known key has even two.
_DEEPEST = 4

#: Tensors, and values, of one file: four times the most that `LONGEST_LIST` stands for, and far
#: more than there are keys.
_MOST_TENSORS = 600_000
_MOST_VALUES = 100_000

_REFETCH = "Fetch the file again; it is not a complete GGUF file."
_CONVERT = "Convert the adapter again with a llama.cpp of today."


class GgufFile(NamedTuple):
    """Values by key, as plain Python has them, and tensors by name in the order of the header."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def parse_gguf(path: Path, stream: BinaryIO, size: int, stamp: Stamp | None = None) -> GgufFile:
    """What the header of a GGUF file of `size` bytes says, read through `stream`.

    Shapes are row-major, as everywhere else. `path` is where the tensors will be read, and what
    errors call it; `stamp` is what it was when it was opened, None for a stream over the network.
    Raises FileError for what is damaged, not complete, or of a form that is not read.
    """
    start = stream.read(LOOKED_AT)
    refuse_known_impostors(path, start, size)
    if not start.startswith(GGUF_MAGIC):
        raise FileError(
            f"{path}: not a GGUF file (its first bytes are {start[:8]!r}).",
            "Check what the file really is; its name does not fit its content.",
        )
    header = _Header(path, Cursor(stream, len(GGUF_MAGIC), min(size, LONGEST_LIST)), stamp)
    try:
        return header.parse(size)
    except UnicodeDecodeError:
        damage = "it has a name that is not UTF-8"
    except Malformed as error:
        damage = str(error)
    raise FileError(f"{path}: a damaged GGUF file ({damage}).", _REFETCH)


class _Entry(NamedTuple):
    """What the header says of a tensor; `offset` counts from the beginning of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """A header that is being read."""

    def __init__(self, path: Path, cursor: Cursor, stamp: Stamp | None) -> None:
        self._path = path
        self._cursor = cursor
        self._stamp = stamp
        self._elements_left = _MOST_ELEMENTS

    def parse(self, size: int) -> GgufFile:
        self._check_version()
        tensors = self._count("tensors", _MOST_TENSORS)
        values = self._count("values", _MOST_VALUES)
        known: dict[str, Any] = {}
        for _ in range(values):
            key = self._name()
            if key in known:
                raise Malformed(f"it has the key {key!r} twice")
            known[key] = self._value(self._cursor.number(4), 0)
        alignment = known.get(ALIGNMENT, USUAL_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise Malformed(f"its alignment is {str(alignment)[:80]}, which is no power of two")
        entries: dict[str, _Entry] = {}
        for _ in range(tensors):
            entry = self._entry(alignment)
            if entry.name in entries:
                raise Malformed(f"it has two tensors called {entry.name!r}")
            entries[entry.name] = entry
        data_start = -(-self._cursor.position // alignment) * alignment
        found = {name: self._tensor(entry, data_start) for name, entry in entries.items()}
        _check_places(self._path, found.values(), size)
        return GgufFile(known, found)

    def _check_version(self) -> None:
        version = self._cursor.number(4)
        if version and version & 0xFFFF == 0:
            raise FileError(f"{self._path}: a GGUF file that is written big-endian.", _CONVERT)
        if version not in (2, 3):
            raise FileError(
                f"{self._path}: a GGUF file of version {version}; 2 and 3 are read.", _CONVERT
            )

    def _count(self, what: str, most: int) -> int:
        count = self._cursor.number(8)
        if count > most:
            raise Malformed(f"it announces more than {most:,} {what}")
        return count

    def _name(self) -> str:
        length = self._cursor.number(8)
        if length > LONGEST_NAME:
            raise Malformed("it has a name that is too long for one")
        return self._cursor.take(length).decode("utf-8")

    def _value(self, kind: int, depth: int) -> Any:
        cursor = self._cursor
        if kind == _STRING:
            return cursor.take(cursor.number(8)).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(cursor.number(4), cursor.number(8), depth + 1)
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, count: int, depth: int) -> list[Any]:
        if depth > _DEEPEST:
            raise Malformed("its arrays lie too deep inside each other")
        # An array inside of one counts itself too, so that empty ones end as well.
        self._elements_left -= count
        if self._elements_left < 0:
            raise Malformed(f"its arrays have more than {_MOST_ELEMENTS:,} elements")
        if kind in (_STRING, _ARRAY):
            return [self._value(kind, depth) for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in GGUF_TYPES:
            raise Malformed(f"it has a value of the unknown type {kind}")
        form = GGUF_TYPES[kind][1]
        raw = self._cursor.take(count * struct.calcsize(f"<{form}"))
        if kind == _BOOL and any(byte > 1 for byte in raw):
            raise Malformed("it has a truth that is neither 0 nor 1")
        return list(struct.unpack(f"<{count}{form}", raw))

    def _entry(self, alignment: int) -> _Entry:
        name = self._name()
        axes = self._cursor.number(4)
        if axes > MOST_AXES:
            raise Malformed(f"tensor {name!r} has {axes:,} axes")
        shape = struct.unpack(f"<{axes}Q", self._cursor.take(8 * axes))[::-1]
        kind, offset = self._cursor.number(4), self._cursor.number(8)
        if math.prod(filter(None, shape)) >> 62:
            raise Malformed(f"tensor {name!r} has an impossible shape")
        if offset % alignment:
            raise Malformed(f"tensor {name!r} begins at no multiple of {alignment}")
        return _Entry(name, shape, kind, offset)

    def _tensor(self, entry: _Entry, data_start: int) -> TensorInfo:
        path, stamp, start = self._path, self._stamp, data_start + entry.offset
        name, shape, kind, _ = entry
        if kind in PLAIN:
            return TensorInfo(name, PLAIN[kind], shape, path, start, stamp=stamp)
        block = BLOCKS.get(kind)
        if block is None:
            raise FileError(
                f"{path}: tensor {name!r} is of ggml's type number {kind}, which is not known.",
                "Convert the adapter again as F32, F16, BF16 or Q8_0.",
            )
        if not shape or shape[-1] % block.values:
            raise Malformed(f"tensor {name!r} has rows that are no whole blocks of {block.name}")
        nbytes = math.prod(shape) // block.values * block.nbytes
        return in_blocks(TensorInfo(name, "U8", (nbytes,), path, start, stamp=stamp), shape, block)


def _check_places(path: Path, tensors: Collection[TensorInfo], size: int) -> None:
    """Refuse tensors that share bytes, or are not all there."""
    end = 0
    filled = (info for info in tensors if info.disk_bytes)
    for info in sorted(filled, key=lambda info: info.start):
        if info.start < end:
            raise Malformed(f"tensor {info.name!r} overlaps another one")
        end = info.start + info.disk_bytes
    if end > size:
        raise TruncatedError(
            f"{path}: truncated: the header describes {format_bytes(end)}, "
            f"{format_bytes(size)} are there ({counted(end - size, 'byte')} missing).",
            _REFETCH,
        )
