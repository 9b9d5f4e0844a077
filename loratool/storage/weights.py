"""The weights in a folder, from headers alone: shards put together by an index, or one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from loratool.errors import BaseError, FileError, listed
from loratool.storage.archive import Archive
from loratool.storage.bounded import Malformed
from loratool.storage.filenames import (
    INDEX,
    MODEL,
    MODEL_ENTRIES,
    NATIVE,
    NATIVE_ENTRIES,
    NATIVE_PART,
    SHARD,
    TORCH_SUFFIXES,
)
from loratool.storage.folder import CachedFolder, Folder
from loratool.storage.gguf import parse_gguf
from loratool.storage.header import parse_header
from loratool.storage.kinds import (
    CONTAINERS,
    LOOKED_AT,
    ZIP,
    container_by_name,
    container_of,
    refuse_known_impostors,
)
from loratool.storage.npz import parse_npz
from loratool.storage.tensors import TensorInfo
from loratool.storage.torchfile import parse_pickled
from loratool.words import agreeing, by_number, counted, enumerated

#: Containers that say at their end what is in them, or in all of them.
_WHOLE = ("torch", "npz")


@dataclass
class Weights:
    """`tensors` by name, and which output shard each belongs to.

    `shards` maps the file name a shard will have in an output (`.bin` becomes `.safetensors`) to
    the names of its tensors in file order. `metadata` is that of all files; where two say different
    things by one name, it is what the first one says. `notes` say what is odd about the files.
    """

    tensors: dict[str, TensorInfo]
    shards: dict[str, list[str]]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Contents:
    """What the header of one file says.

    `top` is the kind of its outermost object: anything for torch files, "dict" for all others.
    `values` are what a GGUF file says beside its tensors, as plain Python has them. `note` says
    that its name is that of another `container` than it is, where that is so.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    top: str = "dict"
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    container: str = "safetensors"


def read_contents(folder: Folder, name: str) -> Contents:
    """The header of a file of any kind, by how it begins; where that does not tell, by its ending.

    Raises FileError for what is damaged, and for what holds no weights.
    """
    wanted = container_by_name(name)
    if wanted in _WHOLE:
        folder.fetch([name])  # what these hold cannot be told from their beginning
    kind, found = _opened(folder, name)
    if found is None:
        folder.fetch([name])
        kind, found = _opened(folder, name)
    assert found is not None
    if kind == wanted:
        return replace(found, container=kind)
    note = (
        f"{name} is {CONTAINERS[kind]} by what is in it, and was read as one. Other programs go by "
        f"its name and expect {CONTAINERS[wanted]}."
    )
    return replace(found, note=note, container=kind)


def _opened(folder: Folder, name: str) -> tuple[str, Contents | None]:
    """The container that a file is, and what is in it; None where it must be on the disk for it."""
    path = folder.path / name
    with folder.reading(name) as (stream, size, stamp):
        start = stream.read(LOOKED_AT)
        refuse_known_impostors(path, start, size)
        kind = container_of(start) or container_by_name(name)
        if start.startswith(ZIP) and stamp is not None:
            kind = _zipped(stream, size) or kind
        stream.seek(0)
        if kind == "gguf":
            found = parse_gguf(path, stream, size, stamp)
            return kind, Contents(found.tensors, values=found.values)
        if kind not in _WHOLE:
            return kind, Contents(*parse_header(path, stream, size, stamp))
        if stamp is None:
            return kind, None
        if kind == "npz":
            return kind, Contents(parse_npz(path, stream, stamp))
        tensors, top = parse_pickled(path, stream, stamp)
        return kind, Contents(tensors, top=top)


def _zipped(stream: BinaryIO, size: int) -> str:
    """Which of the containers that are zip archives a file is; "" where it is damaged."""
    try:
        names = Archive(stream, size).entries
    except Malformed:
        return ""
    ends = {name.rpartition("/")[2].rpartition(".")[2] for name in names}
    return "npz" if "npy" in ends and "pkl" not in ends else "torch"


def entry_of(folder: Folder) -> str | None:
    """The file that a model directory is opened by, if there is one of the usual name."""
    return next((name for name in (*MODEL_ENTRIES, *NATIVE_ENTRIES) if folder.has(name)), None)


def read_folder(folder: Folder, partial: bool = False) -> Weights:
    """The weights of a model directory.

    With `partial` it may lack some of the shards in its index, but not all. Raises FileError for
    what is missing or damaged.
    """
    entry = entry_of(folder)
    if entry is None:
        return read_one(folder, _only_weights_file(folder))
    if entry == MODEL and folder.has(INDEX):
        _refuse_split(folder)
    _refuse_parallel(folder, entry)
    return read_entry(folder, entry, partial)


def read_entry(folder: Folder, entry: str, partial: bool = False) -> Weights:
    """The weights of one index, or in one file."""
    return (
        read_index(folder, entry, partial) if entry.endswith(".json") else read_one(folder, entry)
    )


def read_one(folder: Folder, name: str) -> Weights:
    """The weights in one file."""
    contents = _named_weights(folder, name)
    whole = NATIVE if name == NATIVE or NATIVE_PART.fullmatch(name) else MODEL
    notes = [contents.note] * bool(contents.note)
    return Weights(contents.tensors, {whole: list(contents.tensors)}, contents.metadata, notes)


def _refuse_parallel(folder: Folder, name: str) -> None:
    """Raise FileError for one of the parts that each hold a piece of every weight."""
    if not NATIVE_PART.fullmatch(name):
        return
    parts = [other for other in folder.names(depth=0) if NATIVE_PART.fullmatch(other)]
    if len(parts) > 1 or name != "consolidated.00.pth":
        raise FileError(
            f"{folder.path}: {counted(len(parts), 'file')} ({parts[0]} … {parts[-1]}), each of "
            "which holds a piece of every weight, for as many GPUs (tensor parallel).",
            "That is not read. Take the Hugging Face version of the model, or make it with "
            "transformers' convert_llama_weights_to_hf.py.",
        )


def _refuse_split(folder: Folder) -> None:
    """Raise FileError where the single file is one of several shards, by the index beside it."""
    weight_map = folder.json(INDEX).get("weight_map")
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if MODEL in files and len(files) > 1:
        raise FileError(
            f"{folder.path / INDEX}: it names {MODEL} as one of {len(files)} shards, and "
            f"transformers would load {MODEL} alone.",
            "Rename that shard, in the index too.",
        )


def _refuse_unlisted(folder: Folder, index: Path, names: Sequence[str]) -> None:
    """Raise FileError for shards that belong to those an index names, by their own names, and are
    there, but that it does not list: a part of the weights would be missing."""
    sets: dict[tuple[str, str], set[str]] = {}
    for name in names:
        shard = SHARD.fullmatch(name)
        if shard:
            sets.setdefault((shard["stem"], Path(name).suffix), set()).add(shard["count"])
    for (stem, suffix), counts in sets.items():
        if len(counts) > 1:
            raise FileError(
                f"{index}: it names shards of sets of {' and of '.join(sorted(counts))}.",
                "Index and shards do not belong together; fetch both again.",
            )
        count = counts.pop()
        whole = [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
        unlisted = [name for name in whole if name not in names and folder.has(name)]
        if unlisted:
            raise FileError(
                f"{index}: it does not list {counted(len(unlisted), 'shard')} of the same set:\n"
                + listed(unlisted),
                "Index and shards do not belong together; fetch both again.",
            )


def refuse_part(folder: Folder, name: str) -> None:
    """Raise FileError for one shard of several, by its name."""
    _refuse_parallel(folder, name)
    shard = SHARD.fullmatch(name)
    if shard and int(shard["count"]) > 1:
        raise FileError(
            f"{folder.path / name}: this is shard {int(shard['number'])} of "
            f"{int(shard['count'])}, a part of the weights.",
            f"Give the directory, with all shards in it: {folder.path}.",
        )


def _only_weights_file(folder: Folder) -> str:
    found = [n for n in folder.names(depth=0) if n.endswith(".safetensors")]
    if len(found) == 1:
        refuse_part(folder, found[0])
        return found[0]
    if found:
        raise FileError(
            f"{folder.path}: {len(found)} safetensors files but no model.safetensors.index.json.",
            "Fetch the index too; it says which tensor lies in which file.",
        )
    wanted = "Expected model.safetensors, or shards with model.safetensors.index.json."
    inner = {name.partition("/")[0] for name in folder.names(depth=1) if "/" in name[:-1]}
    models = [
        name for name in sorted(inner, key=by_number) if entry_of(folder.inside(name)) is not None
    ]
    if models:
        models.sort(key=by_number)
        wanted = f"In {enumerated(models)} there is a model: give {folder.path / models[-1]}."
    raise FileError(
        f"{folder.path}: no model weights in this directory.",
        folder.remedy if isinstance(folder, CachedFolder) else wanted,
    )


def read_index(folder: Folder, entry: str, partial: bool = False) -> Weights:
    """The weights that an index puts together. Raises FileError where the two do not fit."""
    index = folder.path / entry
    weight_map = folder.json(entry).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: it has no weight_map.", "Fetch the index again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise FileError(
                f"{index}: tensor {tensor!a} is said to lie in {name!a}, outside the directory.",
                "An index names files beside itself; fetch it again from a source you trust.",
            )
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not folder.has(name)]
    if partial and len(missing) < len(names):
        names = [name for name in names if name not in missing]
        weight_map = {t: name for t, name in weight_map.items() if name not in missing}
    elif missing:
        raise FileError(
            f"{index}: {len(missing)} of {counted(len(names), 'shard')} "
            f"{agreeing(len(missing), 'is')} missing:\n" + listed(ascii(name) for name in missing),
            folder.remedy,
        )
    _refuse_unlisted(folder, index, names)
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}
    metadata: dict[str, str] = {}
    notes = []
    for name, contents in _read_files(folder, sorted(names)):
        found = contents.tensors
        metadata = {**contents.metadata, **metadata}
        notes += [contents.note] * bool(contents.note)
        # The index decides; a tensor it does not know is kept, one it places elsewhere is not.
        here = {t: info for t, info in found.items() if weight_map.get(t, name) == name}
        unmapped = [t for t in here if t not in weight_map]
        if unmapped:
            notes.append(f"{name} holds {counted(len(unmapped), 'tensor')} the index does not list")
        twice = [t for t in here if t in tensors]
        if twice:
            raise FileError(
                f"{index}: tensor {twice[0]!r} is in two shards and the index lists neither.",
                "Fetch the index again.",
            )
        tensors.update(here)
        target = _output_name(name)
        if target in shards:
            raise FileError(
                f"{index}: two of its shards would both become {target}.",
                "Keep the weights in one format: either .bin or .safetensors shards.",
            )
        shards[target] = list(here)
    absent = [t for t in weight_map if t not in tensors]
    if absent:
        wanted = [f"{t} (in {weight_map[t]})" for t in absent]
        raise FileError(
            f"{index}: {counted(len(absent), 'tensor', 'is')} not in the shard the index names:\n"
            f"{listed(wanted)}",
            "Index and shards do not belong together; fetch both again.",
        )
    return Weights(tensors, shards, metadata, notes)


def _read_files(folder: Folder, names: Sequence[str]) -> Iterator[tuple[str, Contents]]:
    """The headers of shards in this order; several at a time, for the Hub is slow to answer."""
    first, *others = names
    yield first, _named_weights(folder, first)
    with ThreadPoolExecutor(8) as pool:
        yield from zip(
            others, pool.map(lambda name: _named_weights(folder, name), others), strict=True
        )


def _named_weights(folder: Folder, name: str) -> Contents:
    contents = read_contents(folder, name)
    if contents.top != "dict":
        raise BaseError(
            f"{folder.path / name}: its top object is a {contents.top}, not named weights.",
            "Check the file.",
        )
    return contents


def _output_name(shard: str) -> str:
    if Path(shard).suffix in TORCH_SUFFIXES:
        return Path(shard.replace("pytorch_model", "model")).with_suffix(".safetensors").name
    return shard
