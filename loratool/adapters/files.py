"""Which files of a folder hold an adapter: one, or the shards of a set that is whole."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.companions import is_companion
from loratool.adapters.dialects.torchtune import is_original_of
from loratool.errors import FileError, listed
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_ENTRIES,
    ADAPTER_INDICES,
    INDEX,
    SHARD,
    TORCHTUNE,
    WEIGHTS_SUFFIXES,
)
from loratool.storage.folder import CachedFolder, Folder
from loratool.storage.hub.folder import not_there
from loratool.storage.tensors import TensorInfo
from loratool.storage.weights import read_contents, read_index
from loratool.words import counted


@dataclass(frozen=True)
class Held:
    """What the weights files of an adapter hold.

    `entry` is the name people know it by: the file, the index of its shards, or the first of shards
    that have no index; `names` are all of the files, in `folder`.
    """

    folder: Folder
    entry: str
    names: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    top: str = "dict"
    values: dict[str, Any] = field(default_factory=dict)


def read_held(folder: Folder, file: str, source: str | Path) -> Held:
    """The headers of the adapter in `folder`, or of its `file` if that is not "".

    Raises FileError for what is damaged, not there, or only a part.
    """
    entry = file or _find(folder, source)
    inner, _, entry = entry.rpartition("/")
    folder = folder.inside(inner) if inner else folder
    if entry.endswith(".index.json"):
        return _indexed(folder, entry)
    shard = SHARD.fullmatch(entry)
    if shard and not file and int(shard["count"]) > 1:
        return _numbered(folder, entry)
    contents = read_contents(folder, entry)
    return Held(
        folder, entry, (entry,), contents.tensors, contents.metadata, contents.top, contents.values
    )


def _indexed(folder: Folder, entry: str) -> Held:
    found = read_index(folder, entry)
    names = sorted({info.file.name for info in found.tensors.values()})
    return Held(folder, entry, tuple(names), found.tensors, found.metadata)


def _numbered(folder: Folder, entry: str) -> Held:
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
    return Held(folder, entry, tuple(names), tensors, metadata)


def _set_of(shard: str) -> list[str]:
    """The names of all the shards that one of them belongs to."""
    found = SHARD.fullmatch(shard)
    assert found is not None
    count, suffix = int(found["count"]), Path(shard).suffix
    return [f"{found['stem']}-{i:05d}-of-{found['count']}{suffix}" for i in range(1, count + 1)]


def _find(folder: Folder, source: str | Path) -> str:
    """The entry of the adapter in a folder."""
    path = folder.path
    if not folder.is_there():
        if re.fullmatch(r"-?\d*\.?\d+", str(source)):
            raise FileError(
                f"{source}: taken for a path, and there is no such file.",
                "Options take one value each: --weight 0.5 --weight 0.7.",
            )
        raise not_there(source, path)
    entry = _usual(folder)
    if entry is not None:
        return entry
    if folder.has(INDEX):
        raise FileError(
            f"{path}: this is a base model (sharded weights), not an adapter.",
            "Name the adapter, or one of the shards to look into it.",
        )
    weights = [name for name in folder.names(depth=0) if Path(name).suffix in WEIGHTS_SUFFIXES]
    inside = [name for name in weights if not is_companion(name)]
    deeper = {name.partition("/")[0] for name in folder.names(depth=1) if "/" in name[:-1]}
    found = ((inner, _usual(folder.inside(inner))) for inner in sorted(deeper))
    inside += [f"{inner}/{name}" for inner, name in found if name is not None]
    inside = inside or weights  # an optimizer's state alone is at least called by its name
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise FileError(
            f"{path}: no {ADAPTER_ENTRIES[0]} in this directory.",
            f"Name one of the files in it: {', '.join(str(path / name) for name in inside[:5])}"
            + (", …" if len(inside) > 5 else "."),
        )
    wanted = f"Expected {ADAPTER_ENTRIES[0]} beside {ADAPTER_CONFIG}."
    raise FileError(
        f"{path}: no adapter weights in this directory.",
        folder.remedy if isinstance(folder, CachedFolder) else wanted,
    )


def _usual(folder: Folder) -> str | None:
    """The entry of an adapter by the names that adapters usually have; None without one."""
    of_torchtune = [name for name in folder.names(depth=0) if TORCHTUNE.fullmatch(name)]
    for name in (*ADAPTER_ENTRIES, *ADAPTER_INDICES):
        if folder.has(name):
            return _exported_from(folder, name, of_torchtune) or name
    if len(of_torchtune) == 1:
        return of_torchtune[0]
    named = folder.has(ADAPTER_CONFIG)
    for index in (INDEX, "pytorch_model.bin.index.json") if named else ():
        # A trainer that saves "the model" in shards names an adapter's like a model's.
        weight_map = folder.json(index).get("weight_map") if folder.has(index) else None
        if isinstance(weight_map, dict) and any("lora_" in str(key) for key in weight_map):
            return index
    return _first_shard(folder.names(depth=0), "" if named else "adapter")


def _exported_from(folder: Folder, entry: str, candidates: list[str]) -> str | None:
    """The one of torchtune's files that `entry` is its export of; None where it is no export."""
    exported = read_contents(folder, entry).tensors if candidates else {}
    folder.fetch([entry] * bool(candidates))
    for name in candidates:
        with suppress(FileError):  # a damaged file is no reason to refuse the other one
            if is_original_of(read_contents(folder, name).tensors, exported):
                return name
    return None


def _first_shard(names: list[str], stem: str) -> str | None:
    """The first of numbered shards whose names begin so, safetensors before others; None if there
    are none, or several sets."""
    sets: dict[str, dict[tuple[str, str], str]] = {".safetensors": {}, ".bin": {}}
    for name in sorted(names, reverse=True):
        shard = SHARD.fullmatch(name)
        if shard and shard["stem"].startswith(stem) and int(shard["count"]) > 1:
            sets[Path(name).suffix][shard["stem"], shard["count"]] = name
    found = next((kind for kind in sets.values() if kind), {})
    return next(iter(found.values())) if len(found) == 1 else None
