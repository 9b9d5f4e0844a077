"""What the files of an adapter hold: one file, or the shards of a set that is whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.finding import find_entry
from loratool.errors import FileError, listed
from loratool.notices import Notice
from loratool.storage.filenames import SHARD
from loratool.storage.folder import Folder
from loratool.storage.kinds import container_by_name
from loratool.storage.tensors import TensorInfo
from loratool.storage.weights import read_contents, read_index
from loratool.words import counted


@dataclass(frozen=True)
class Held:
    """What the weights files of an adapter hold.

    `entry` is the name people know it by: the file, the index of its shards, or the first of shards
    that have no index; `names` are all of the files, in `folder`. `notices` say how it was found,
    `in_torch` that torch wrote them, whatever their names.
    """

    folder: Folder
    entry: str
    names: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    top: str = "dict"
    values: dict[str, Any] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    in_torch: bool = False


def read_held(folder: Folder, file: str, source: str | Path) -> Held:
    """The headers of the adapter in `folder`, or of its `file` if that is not "".

    Raises FileError for what is damaged, not there, or only a part.
    """
    entry, notices = (file, []) if file else find_entry(folder, source)
    inner, _, entry = entry.rpartition("/")
    folder = folder.inside(inner) if inner else folder
    if entry.endswith(".index.json"):
        return _indexed(folder, entry, notices)
    shard = SHARD.fullmatch(entry)
    if shard and not file and int(shard["count"]) > 1:
        return _numbered(folder, entry, notices)
    contents = read_contents(folder, entry)
    if contents.note:
        notices.append(Notice("other-container", contents.note, entry))
    return Held(
        folder, entry, (entry,), contents.tensors, contents.metadata, contents.top,
        contents.values, notices, contents.container == "torch",
    )  # fmt: skip


def _indexed(folder: Folder, entry: str, notices: list[Notice]) -> Held:
    found = read_index(folder, entry)
    names = sorted({info.file.name for info in found.tensors.values()})
    in_torch = container_by_name(names[0]) == "torch" if names else False
    return Held(
        folder, entry, tuple(names), found.tensors, found.metadata, "dict", {}, notices, in_torch
    )


def _numbered(folder: Folder, entry: str, notices: list[Notice]) -> Held:
    """Shards that say in their names how many they are, without an index."""
    names = _set_of(entry)
    missing = [name for name in names if not folder.has(name)]
    if missing:
        raise FileError(
            f"{folder.path}: {len(missing)} of {counted(len(names), 'shard')} of the adapter "
            f"{'is' if len(missing) == 1 else 'are'} missing:\n{listed(missing)}",
            folder.remedy,
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        contents = read_contents(folder, name)
        twice = next((key for key in contents.tensors if key in tensors), None)
        if twice is not None:
            raise FileError(
                f"{folder.path / name}: tensor {twice!a} is in another shard too.",
                "Save the adapter again, or fetch its index.",
            )
        tensors |= contents.tensors
        metadata = metadata or contents.metadata
    in_torch = container_by_name(entry) == "torch"
    return Held(folder, entry, tuple(names), tensors, metadata, notices=notices, in_torch=in_torch)


def _set_of(shard: str) -> list[str]:
    """The names of all the shards that one of them belongs to."""
    found = SHARD.fullmatch(shard)
    assert found is not None
    count, suffix = int(found["count"]), Path(shard).suffix
    return [f"{found['stem']}-{i:05d}-of-{found['count']}{suffix}" for i in range(1, count + 1)]
