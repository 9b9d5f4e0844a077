"""The header of a safetensors file, read with suspicion.

Layout: 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape,
data_offsets}}` with an optional `__metadata__` of strings, then the tensor data. Offsets count from
the end of the header. As the format demands, the tensors must tile the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from loratool.dtypes import DTYPE_BITS
from loratool.errors import FileError, TruncatedError
from loratool.storage.bounded import LONGEST_LIST, LONGEST_NAME, MOST_AXES, Malformed, open_regular
from loratool.storage.jsonscan import Scanner
from loratool.storage.kinds import LOOKED_AT, refuse_known_impostors
from loratool.storage.stamps import Stamp, stamp_of
from loratool.storage.tensors import TensorInfo
from loratool.words import agreeing, counted, format_bytes

#: More characters than the description of a tensor with so many axes has.
_LONGEST_ENTRY = 4096

_METADATA = "__metadata__"

#: What the description of a tensor has, and the characters of a header up to which no more memory
#: is taken by parsing it at once than anybody has.
_FIELDS = {"dtype", "shape", "data_offsets"}
_SHORT = 1_000_000
_LARGEST = 1 << 62

_REFETCH = "Fetch the file again; it is not a complete safetensors file."


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name in file order, and the `__metadata__` strings.

    Raises FileError with what is wrong for anything that is not a well-formed, complete file.
    """
    if not path.exists():
        raise FileError(f"{path}: no such file.", "Check the path.")
    with open_regular(path) as stream:
        stamp = stamp_of(stream.fileno())
        return parse_header(path, stream, stamp.nbytes, stamp)


def parse_header(
    path: Path, stream: BinaryIO, size: int, stamp: Stamp | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """`read_header` of a file of `size` bytes that is read through `stream`.

    `path` is where the tensors will be read, and what errors call it; `stamp` is what it was when
    it was opened, None for a stream over the network.
    """
    start = stream.read(LOOKED_AT)
    refuse_known_impostors(path, start, size)
    start = start[:8]
    if size < 8:
        raise FileError(
            f"{path}: only {counted(size, 'byte')} long, too short for a header.", _REFETCH
        )
    length = int.from_bytes(start, "little")
    if length > max(size, LONGEST_LIST) or (start[:4].isascii() and start[:4].isalnum()):
        raise FileError(
            f"{path}: not a safetensors file (its first bytes are {start!r}).",
            "Check what the file really is; its name does not fit its content.",
        )
    if 8 + length > size:
        raise TruncatedError(
            f"{path}: truncated in its header: {format_bytes(8 + length)} announced, "
            f"{format_bytes(size)} there.",
            _REFETCH,
        )
    if length > LONGEST_LIST:
        raise FileError(
            f"{path}: its header is {format_bytes(length)} long; the longest that is read is "
            f"{format_bytes(LONGEST_LIST)}.",
            "No model has so many tensors in one file. Check what the file really is.",
        )
    stream.seek(8)
    raw = stream.read(length)
    if len(raw) < length:
        raise TruncatedError(f"{path}: the file ended within its header.", _REFETCH)
    tensors, metadata = _parse(path, raw, 8 + length, stamp)
    _check_tiling(path, tensors, 8 + length, size)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata


def header_bytes(path: Path) -> bytes:
    """The bytes of a well-formed file before its data."""
    with open_regular(path) as stream:
        start = stream.read(8)
        return start + stream.read(int.from_bytes(start, "little"))


def described(path: Path, start: bytes) -> list[TensorInfo]:
    """The tensors that the first bytes of a file describe, in the order of their data."""
    tensors, _ = _parse(path, start[8:], len(start))
    return sorted(tensors.values(), key=lambda info: info.start)


def _parse(
    path: Path, raw: bytes, data_start: int, stamp: Stamp | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        return _parse_text(path, raw.decode("utf-8"), data_start, stamp)
    except UnicodeError as error:
        raise FileError(f"{path}: the header is not UTF-8 ({error}).", _REFETCH) from None
    except Malformed as error:
        raise FileError(f"{path}: the header is damaged: {error}.", _REFETCH) from None


def _parse_text(
    path: Path, text: str, data_start: int, stamp: Stamp | None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    known = _plain(text)
    if known is not None:
        metadata = known.pop(_METADATA, {})
        return {
            n: _tensor(path, n, entry, data_start, stamp) for n, entry in known.items()
        }, metadata
    return _scanned(path, text, data_start, stamp)


def _plain(text: str) -> dict[str, Any] | None:
    """The entries of a header of usual length that has nothing odd, parsed at once, which takes a
    third of the time; None for one that must be scanned to say what is wrong with it."""
    if len(text) > _SHORT or not text.startswith("{") or not text.isascii() or "\\u" in text:
        return None
    # Of more small values in so little text no header is made; parsed, they would fill memory.
    if 15 * (text.count("[") + text.count("{")) > len(text) or 12 * text.count(":") > len(text):
        return None
    try:
        found: dict[str, Any] = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    for name, entry in found.items():
        if len(name) > LONGEST_NAME or type(entry) is not dict:
            return None
        if name == _METADATA:
            if not all(type(value) is str for value in entry.values()):
                return None
        elif entry.keys() != _FIELDS or type(entry["shape"]) is not list:
            return None
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _scanned(
    path: Path, text: str, data_start: int, stamp: Stamp | None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    scanner = Scanner(text)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    for name in scanner.members():
        if len(name) > LONGEST_NAME:
            raise Malformed(f"it has a name of {len(name):,} characters")
        if name in tensors or (name == _METADATA and metadata is not None):
            raise Malformed(f"it names {name!r} twice")
        if name == _METADATA:
            metadata = _strings(scanner)
            continue
        try:
            entry = scanner.value(_LONGEST_ENTRY)
        except Malformed as error:
            raise Malformed(f"tensor {name!r}: {error}") from None
        tensors[name] = _tensor(path, name, entry, data_start, stamp)
    scanner.end()
    return tensors, metadata or {}


def _strings(scanner: Scanner) -> dict[str, str]:
    """The value of `__metadata__`: strings by name, or null."""
    found: dict[str, str] = {}
    if scanner.next() == "n" and scanner.value(len("null,")) is None:
        return found
    if scanner.next() != "{":
        raise Malformed("__metadata__ is not a table of strings")
    for name in scanner.members():
        if name in found:
            raise Malformed(f"it names {name[:80]!r} twice")
        if scanner.next() != '"':
            raise Malformed("__metadata__ is not a table of strings")
        found[name] = scanner.string()
    return found


def _tensor(
    path: Path, name: str, entry: Any, data_start: int, stamp: Stamp | None = None
) -> TensorInfo:
    def bad(what: str) -> FileError:
        return FileError(f"{path}: tensor {name!r} {what}.", _REFETCH)

    if not isinstance(entry, dict):
        raise bad("has no description")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"has the unknown dtype {str(dtype)[:80]!r}")
    if not _are_counts(shape) or len(shape) > MOST_AXES or math.prod(filter(None, shape)) >> 62:
        raise bad("has an impossible shape" + (f" {shape!r}" if len(str(shape)) < 99 else ""))
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"has the impossible data_offsets {str(offsets)[:80]}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise bad(
            f"of {dtype} {shape} needs {-(-bits // 8)} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], stamp=stamp)


def _are_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110  # a generator takes twice as long, and there are very many
        if type(n) is not int or not 0 <= n < _LARGEST:
            return False
    return True


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    infos = list(tensors.values())
    placed = sorted((info.start, info.nbytes, number) for number, info in enumerate(infos))
    for _, nbytes, number in placed:
        info = infos[number]
        if info.start < position:
            raise FileError(f"{path}: tensor {info.name!r} overlaps another one.", _REFETCH)
        if info.start > position:
            raise FileError(
                f"{path}: {counted(info.start - position, 'byte')} before tensor {info.name!r} "
                f"{agreeing(info.start - position, 'belongs')} to no tensor.",
                _REFETCH,
            )
        position += nbytes
    if position > size:
        raise TruncatedError(
            f"{path}: truncated: the header describes {format_bytes(position)}, "
            f"{format_bytes(size)} are there ({counted(position - size, 'byte')} missing).",
            _REFETCH,
        )
    if position < size:
        raise FileError(
            f"{path}: {counted(size - position, 'byte')} after the last tensor.", _REFETCH
        )


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
    size: int = 0,
) -> bytes:
    """The first bytes of a safetensors file holding `(name, dtype, shape)` in this order.

    The data starts at a multiple of 8 bytes, as in files of the reference implementation. With
    `size` the header is filled up with spaces to that many bytes.
    """
    entries: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * max(-len(text) % 8, size - 8 - len(text))
    return len(text).to_bytes(8, "little") + text
