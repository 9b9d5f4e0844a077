"""The arrays of an `.npz` file, a zip archive of `.npy` files, found without unpickling anything.

NumPy's `savez` writes such files, and so did MLX before it wrote safetensors. Their entries lie
uncompressed, each behind a header of its own that says dtype, order and shape; so arrays are read
by byte range like the tensors of safetensors. The header is a Python literal, of which exactly what
plain arrays have is read here, by a pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from loratool.dtypes import DTYPE_BITS
from loratool.errors import FileError
from loratool.storage.archive import Archive
from loratool.storage.bounded import LONGEST_NAME, MOST_AXES, Cursor, Malformed
from loratool.storage.kinds import LOOKED_AT, refuse_known_impostors
from loratool.storage.stamps import Stamp
from loratool.storage.tensors import TensorInfo, odd_strides

_MAGIC = b"\x93NUMPY"

#: Bytes of the longest header of an array. NumPy reads no longer ones either.
_LONGEST_HEADER = 10_000

#: Dtypes by what NumPy calls them in headers. Two raw bytes are MLX's bfloat16, which NumPy lacks:
#: it writes them as "<V2", and NumPy, given such an array, writes it again as "|V2".
_DTYPES = {
    "<f2": "F16", "<f4": "F32", "<f8": "F64", "<V2": "BF16", "|V2": "BF16", "<c8": "C64",
    "|i1": "I8", "<i2": "I16", "<i4": "I32", "<i8": "I64",
    "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64", "|b1": "BOOL",
}  # fmt: skip

#: One field of a header: a name, and a text, a truth, a tuple of counts or a list.
_FIELD = re.compile(
    r"""\s*(?P<quote>['"])(?P<name>\w+)(?P=quote)\s*:\s*"""
    r"""(?:'(?P<text>[^']*)'|"(?P<other>[^"]*)"|(?P<truth>True|False)"""
    r"""|\((?P<counts>[\d\sL,]*)\)|(?P<parts>\[[^{}]*\]))\s*(?P<end>,\s*\}|,|\})"""
)

_REFETCH = "Fetch the file again, or ask for a safetensors version of it."
_SAVE_PLAIN = "Save the weights as safetensors, or with numpy.savez as plain numbers."


def parse_npz(path: Path, stream: BinaryIO, stamp: Stamp) -> dict[str, TensorInfo]:
    """The arrays of an `.npz` file by name, in the order of their data.

    All is read through `stream`; `path` is where the arrays will be read, and what errors call it;
    `stamp` is what the file was when it was opened. Raises FileError for a file that is damaged or
    compressed, and for arrays that are no plain numbers.
    """
    refuse_known_impostors(path, stream.read(LOOKED_AT), stamp.nbytes)
    try:
        archive = Archive(stream, stamp.nbytes)
        found = [_array(path, archive, entry, stamp) for entry in archive.entries]
    except Malformed as error:
        raise FileError(f"{path}: a damaged .npz file ({error}).", _REFETCH) from None
    return {info.name: info for info in sorted(found, key=lambda info: info.start)}


def _array(path: Path, archive: Archive, entry: str, stamp: Stamp) -> TensorInfo:
    name = entry.removesuffix(".npy")
    if name == entry:
        raise FileError(
            f"{path}: its entry {entry[:200]!r} is no NumPy array.", "Check what the file is."
        )
    if len(name) > LONGEST_NAME:
        raise Malformed(f"it has a name of {len(name):,} characters")
    if archive.entries[entry].is_compressed:
        raise FileError(
            f"{path}: a compressed .npz file; {name!r} does not lie in it as it is.",
            "Save it again with numpy.savez, not savez_compressed, or as safetensors.",
        )
    cursor = archive.open(entry)
    fields = _header(cursor, name)
    descr, fortran, counts = (fields.get(key) for key in ("descr", "fortran_order", "shape"))
    if not isinstance(descr, str) or not isinstance(fortran, bool) or not isinstance(counts, tuple):
        raise Malformed(f"the array {name!r} does not say what it is")
    shape = tuple(counts)
    dtype = _dtype(path, name, descr)
    if len(shape) > MOST_AXES or math.prod(filter(None, shape)) >> 62:
        raise Malformed(f"the array {name!r} has an impossible shape")
    wanted = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if cursor.left != wanted:
        raise Malformed(
            f"the array {name!r} has {cursor.left:,} bytes of data and should have {wanted:,}"
        )
    strides = odd_strides(shape, _column_major(shape)) if fortran else None
    return TensorInfo(name, dtype, shape, path, cursor.position, strides, stamp=stamp)


def _dtype(path: Path, name: str, descr: str) -> str:
    if descr in _DTYPES:
        return _DTYPES[descr]
    if "O" in descr:
        raise FileError(
            f"{path}: the array {name!r} is of Python objects, which are pickled.",
            f"loratool never runs code from a file. {_SAVE_PLAIN}",
        )
    if descr.startswith(">"):
        raise FileError(
            f"{path}: the array {name!r} is written big-endian ({descr[:80]}).", _SAVE_PLAIN
        )
    raise FileError(
        f"{path}: the array {name!r} has the dtype {descr[:80]!r}, which is not read.", _SAVE_PLAIN
    )


def _header(cursor: Cursor, name: str) -> dict[str, str | bool | tuple[int, ...]]:
    """The fields of the header at the cursor, which is behind it afterwards."""
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise Malformed(f"the array {name!r} does not begin like one")
    major = cursor.number(1)
    cursor.skip(1)
    if major not in (1, 2, 3):
        raise Malformed(f"the array {name!r} is written in the unknown version {major}")
    length = cursor.number(2 if major == 1 else 4)
    if length > _LONGEST_HEADER:
        raise Malformed(f"the array {name!r} has a header of {length:,} bytes")
    text = cursor.take(length).decode("latin-1" if major < 3 else "utf-8", "replace").strip()
    damaged = Malformed(f"the array {name!r} has a damaged header")
    if not text.startswith("{"):
        raise damaged
    fields: dict[str, str | bool | tuple[int, ...]] = {}
    at = 1
    while at < len(text):
        found = _FIELD.match(text, at)
        if found is None or found["name"] in fields:
            raise damaged
        value: str | bool | tuple[int, ...]
        if found["truth"]:
            value = found["truth"] == "True"
        elif found["counts"] is not None:
            value = _counts(found["counts"], damaged)
        else:  # a list describes a dtype of several fields
            value = found["text"] or found["other"] or found["parts"] or ""
        fields[found["name"]] = value
        at = found.end()
        if found["end"] != "," and at != len(text):
            raise damaged
    if not text.endswith("}"):
        raise damaged
    return fields


def _counts(text: str, damaged: Malformed) -> tuple[int, ...]:
    """The numbers of a tuple as Python writes it: a single one has a comma behind it."""
    parts = [part.strip().removesuffix("L") for part in text.split(",")]
    if parts[-1] == "":
        parts.pop()
    elif len(parts) == 1:
        raise damaged
    if not all(re.fullmatch(r"[0-9]{1,19}", part) for part in parts):
        raise damaged
    return tuple(map(int, parts))


def _column_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of an array whose first axis runs fastest."""
    return tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
