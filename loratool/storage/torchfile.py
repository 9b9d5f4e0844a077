"""The tensors of a torch file (`.bin`, `.pt`), found without running any of its code.

A torch file is a pickle of names and shapes beside raw storages: a zip archive that holds the
storages uncompressed since torch 1.6, one after the other in the file before. `pickles` reads the
pickle as data, with the handful of names that `statedict` knows and no others, so a hostile file
cannot run anything; and since the storages lie raw in the file, tensors are read by byte range like
those of safetensors, in flat memory and without torch.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loratool.errors import FileError, shown_argument
from loratool.storage.archive import Archive
from loratool.storage.bounded import LONGEST_LIST, Cursor, Malformed
from loratool.storage.filenames import WEIGHTS_SUFFIXES
from loratool.storage.kinds import LOOKED_AT, ZIP, refuse_known_impostors, unpacked_to
from loratool.storage.pickles import Ordered, Refused, load
from loratool.storage.stamps import Stamp
from loratool.storage.statedict import Descriptions, Storage, Tensor, named_tensors
from loratool.storage.tensors import TensorInfo, odd_strides
from loratool.words import format_bytes

_REFETCH = "Fetch the file again, or ask for a safetensors version of it."

#: What top objects are called, of the kinds that are ours.
_KINDS = {Tensor: "tensor", Ordered: "dict"}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

#: How much more than its own size a file may describe. Tensors that are views of one storage, or
#: repeat its elements, take work but no space: a file of a kilobyte could keep a run busy for days.
#: Tied and stacked weights are named twice or thrice; a view reads all that lies between its first
#: and its last element, and experts that lie interleaved do so hundreds of times.
_MOST_REPEATS = 8
_MOST_READS = 256
_SMALL = 8_000_000


class _Contents(NamedTuple):
    """The top object, the length of its pickle, and its storages: what they are, and where the data
    of each begins that is there."""

    top: Any
    length: int
    storages: dict[str, Storage]
    starts: dict[str, int]


def parse_pickled(path: Path, stream: BinaryIO, stamp: Stamp) -> tuple[dict[str, TensorInfo], str]:
    """Tensors by name, and what the top object is: "dict", "list" or "tensor".

    Nested tables are flattened with dots ("state.0.exp_avg"), the entries of a list are named by
    their position. Values that are not tensors are left out. All is read through `stream`; `path`
    is where the tensors will be read, and what errors call it; `stamp` is what the file was when it
    was opened. Raises FileError for a file that is damaged, compressed, or needs code to be read.
    """
    size = stamp.nbytes
    start = stream.read(LOOKED_AT)
    refuse_known_impostors(path, start, size)
    try:
        is_zip = start.startswith(ZIP)
        contents = (_read_zip if is_zip else _read_legacy)(path, stream, size)
        found = named_tensors(contents.top, contents.length)
        tensors = {name: _info(path, name, item, contents, stamp) for name, item in found.items()}
        for key in contents.storages.keys() - contents.starts.keys():
            raise Malformed(f"the data of its storage {key[:80]!r} is missing")
    except Refused as error:
        raise FileError(
            f"{path}: not read, because {error}, which is more than plain tensors need.",
            "loratool never runs code from a file. Save the weights as safetensors, where the file "
            "was made: save_file of safetensors.",
        ) from None
    except Malformed as error:
        raise FileError(f"{path}: a damaged torch file ({error}).", _REFETCH) from None
    _check_sizes(path, tensors, found, size)
    kind = type(contents.top)
    return tensors, _KINDS.get(kind, kind.__name__.strip("_"))


def _read_legacy(path: Path, stream: BinaryIO, size: int) -> _Contents:
    def plain() -> Any:
        return load(cursor, first.known, first.persistent)

    first, described = Descriptions(), Descriptions()
    cursor = Cursor(stream, 0, min(size, LONGEST_LIST))
    if plain() != _LEGACY_MAGIC:
        raise FileError(
            f"{path}: a Python pickle, but not a torch file.",
            "Save the tensors by name with safetensors, where the file was made (save_file).",
        )
    protocol, system = plain(), plain()
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise Malformed("its version is unknown")
    if system.get("little_endian", True) is not True:
        raise FileError(f"{path}: written big-endian.", "Save it again on another machine.")
    before = cursor.position
    top = load(cursor, described.known, described.persistent)
    length = cursor.position - before
    keys = plain()
    starts = _legacy_storages(Cursor(stream, cursor.position, size), keys, described.storages)
    return _Contents(top, length, described.storages, starts)


def _legacy_storages(cursor: Cursor, keys: Any, storages: dict[str, Storage]) -> dict[str, int]:
    """Where each storage begins: one after the other, each behind its number of elements."""
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else [None]:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise Malformed("it has the data of a storage that no tensor is in")
        if storage.key in starts:
            raise Malformed(f"it has the storage {storage.key!r} twice")
        if cursor.number(8) != storage.numel:
            raise Malformed(f"its storage {storage.key!r} has another length than announced")
        starts[storage.key] = cursor.position
        cursor.skip(storage.nbytes)
    return starts


def _read_zip(path: Path, stream: BinaryIO, size: int) -> _Contents:
    archive = Archive(stream, size)
    entries = archive.entries
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise _other_archive(path, list(entries))
    folder = pickles[0].removesuffix("data.pkl")

    def opened(name: str, longest: int) -> Cursor:
        entry = entries[name]
        if entry.is_compressed:
            raise FileError(f"{path}: a compressed torch file.", "Save it again with torch.save.")
        if entry.size > longest:
            raise Malformed(
                f"its {name[:200]!r} has {format_bytes(entry.size)}, and none is so long"
            )
        return archive.open(name)

    order = f"{folder}byteorder"
    if order in entries:
        cursor = opened(order, 16)
        if cursor.take(cursor.left) != b"little":
            raise FileError(f"{path}: written big-endian.", "Save it again on another machine.")
    _check_sum(opened(pickles[0], LONGEST_LIST), entries[pickles[0]].crc)
    cursor = opened(pickles[0], LONGEST_LIST)
    described = Descriptions()
    top = load(cursor, described.known, described.persistent)

    starts = {}
    for key, storage in described.storages.items():
        name = f"{folder}data/{key}"
        if name in entries:
            starts[key] = opened(name, size).position
            if entries[name].size != storage.nbytes:  # torch.load refuses longer ones too
                raise Malformed(
                    f"its storage {key[:80]!r} has {entries[name].size:,} bytes and should have "
                    f"{storage.nbytes:,}"
                )
    return _Contents(top, entries[pickles[0]].size, described.storages, starts)


def _other_archive(path: Path, names: list[str]) -> FileError:
    """The error for a zip archive that is no torch file, by what is in it."""
    inside = [name for name in names if Path(name).suffix in WEIGHTS_SUFFIXES]
    out = unpacked_to(path)
    unpack = f"Unpack it: unzip {shown_argument(path)} -d {shown_argument(out)}"
    if not inside:
        held = f" It holds {', '.join(names[:5])}." if names else ""
        return FileError(
            f"{path}: a zip archive, but not a torch file.{held}",
            f"{unpack}, and give what comes out.",
        )
    folders = {str(Path(name).parent) for name in inside}
    where = out.joinpath(*Path(inside[0]).parts[:-1]) if len(folders) == 1 else out
    return FileError(
        f"{path}: a zip archive with weights in it ({inside[0]}), not a torch file.",
        f"{unpack}, and give the folder {shown_argument(where)}.",
    )


def _check_sum(cursor: Cursor, wanted: int) -> None:
    """Compare the checksum of an entry; torch writes 0 where it was told not to compute one."""
    crc = 0
    while cursor.left:
        crc = zlib.crc32(cursor.take(min(cursor.left, 1 << 20)), crc)
    if wanted not in (0, crc):
        raise Malformed("its pickle has another checksum than the archive says")


def _info(path: Path, name: str, tensor: Tensor, contents: _Contents, stamp: Stamp) -> TensorInfo:
    if math.prod(filter(None, tensor.shape)) >> 62:
        raise FileError(f"{path}: tensor {name!r} is larger than any memory.", _REFETCH)
    strides = odd_strides(tensor.shape, tensor.strides)
    info = TensorInfo(name, tensor.dtype, tensor.shape, path, 0, strides, stamp=stamp)
    start = contents.starts.get(tensor.storage.key)
    if start is None:
        raise FileError(f"{path}: the data of tensor {name!r} is missing.", _REFETCH)
    if 0 in tensor.shape:
        return replace(info, start=start)
    if (tensor.offset + tensor.span) * info.itemsize > tensor.storage.nbytes:
        raise FileError(f"{path}: tensor {name!r} reaches beyond its storage.", _REFETCH)
    return replace(info, start=start + tensor.offset * info.itemsize)


def _check_sizes(
    path: Path, tensors: dict[str, TensorInfo], found: dict[str, Tensor], size: int
) -> None:
    """Refuse tensors that come to far more than the file holds."""
    if not tensors:
        return
    described = sum(info.nbytes for info in tensors.values())
    largest = max(tensors.values(), key=lambda info: info.nbytes)
    if described > _MOST_REPEATS * size + _SMALL:
        raise FileError(
            f"{path}: its tensors come to {format_bytes(described)}, and it holds "
            f"{format_bytes(size)}; the largest is {largest}.",
            "They repeat what is stored once. Save copies of them (clone), as safetensors.",
        )
    reads = sum(item.span * tensors[name].itemsize for name, item in found.items())
    if reads > _MOST_READS * size + _SMALL:
        raise FileError(
            f"{path}: its tensors lie so far apart in it that {format_bytes(reads)} would be read "
            f"of {format_bytes(size)}; the largest is {largest}.",
            "They are views of one storage. Save copies of them (clone), as safetensors.",
        )
