"""A base model on disk: its files put together by the index, its config, its tensors by name."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.address import other_reading
from loratool.checkpoint.folder import CachedFolder, Folder, origin_of
from loratool.checkpoint.header import parse_header
from loratool.checkpoint.hub import locate
from loratool.checkpoint.pickled import read_pickled
from loratool.checkpoint.tensors import TensorInfo
from loratool.errors import BaseError, FileError, listed, nearest, shown

#: What a model directory is looked for, in this order: an index or the only file.
_ENTRY_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

_ORDER = "Models come first, adapters after them: BASE ADAPTER; see the examples in --help."

_TORCH_SUFFIXES = {".bin", ".pt", ".pth"}

#: Tensors that only quantised checkpoints have, beside or instead of `….weight`.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|nested_absmax|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_scale_2|input_scale|weight_format|scales)$|_(blocks|scales)$"
)


@dataclass
class Checkpoint:
    """A base model: `tensors` by name, and which output shard each belongs to.

    `shards` maps the file name a shard will have in an output (`.bin` becomes `.safetensors`) to
    the names of its tensors in file order. `folder` holds config and tokenizer; where it is one of
    the Hub, the tensors' files are on the disk only after `fetch`.
    """

    source: Path
    folder: Folder
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, list[str]]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What people gave: a path, or a Hub id."""
        return shown(self.source)

    @property
    def directory(self) -> Path:
        return self.folder.path

    @property
    def is_directory(self) -> bool:
        """Whether the whole folder is the model; otherwise one file of it is."""
        return self.source == self.folder.path

    @property
    def name(self) -> str:
        origin = origin_of(self.source)
        return origin.name if origin else self.source.resolve().name

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({t.file for t in self.tensors.values()})

    def fetch(self, tensors: Iterable[str] | None = None) -> None:
        """See to it that the files of these tensors, or of all, are on this disk."""
        names = self.tensors if tensors is None else tensors
        self.folder.fetch({self.tensors[name].file.name for name in names})

    def identity(self) -> str:
        """sha256 over names, dtypes, shapes and sizes: which checkpoint this is, from headers."""
        lines = sorted(f"{t.name} {t.dtype} {list(t.shape)}" for t in self.tensors.values())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_checkpoint(source: str | Path, partial: bool = False) -> Checkpoint:
    """Read the headers of a base model: a directory, or one weights file.

    With `partial` a directory may lack some of the shards in its index, but not all.

    Raises FileError for what is missing or damaged, BaseError for what is no base model.
    """
    place = locate(source)
    folder = place.folder
    if place.file:
        if place.file.endswith(".json"):
            raise FileError(
                f"{place.path}: this describes a model and holds no weights.",
                f"Give the directory: {folder.path}.",
            )
        tensors, metadata = _read_file(folder, place.file)
        checkpoint = Checkpoint(
            place.path, folder, {}, tensors, {"model.safetensors": list(tensors)}, metadata
        )
    elif folder.is_there():
        checkpoint = _open_directory(folder, partial)
    else:
        path = place.path
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise FileError(
            f"{source}: no such file or directory.",
            f"Did you mean {path.with_name(near)}?"
            if near
            else "Check the path." + other_reading(str(source)),
        )
    if not checkpoint.tensors:
        raise BaseError(f"{source}: the base holds no tensors.", "Check the path.")
    if "__metadata__" in checkpoint.tensors:
        raise FileError(
            f"{source}: a tensor is called __metadata__.", "Safetensors cannot hold it."
        )
    if any(".lora_A" in name or ".lora_embedding_A" in name for name in checkpoint.tensors):
        raise BaseError(f"{source}: this is an adapter, not a base model.", _ORDER)
    if folder.has("config.json"):
        checkpoint.config = folder.json("config.json")
    return checkpoint


def _open_directory(folder: Folder, partial: bool) -> Checkpoint:
    entry = next((name for name in _ENTRY_FILES if folder.has(name)), None)
    if entry is None:
        entry = _only_weights_file(folder)
    if not entry.endswith(".json"):
        tensors, metadata = _read_file(folder, entry)
        return Checkpoint(
            folder.path, folder, {}, tensors, {"model.safetensors": list(tensors)}, metadata
        )
    return _open_index(folder, entry, partial)


def _only_weights_file(folder: Folder) -> str:
    if folder.has("adapter_config.json"):
        raise BaseError(
            f"{folder.path}: this is an adapter, not a base model.",
            _ORDER,
        )
    found = [n for n in folder.names(depth=0) if n.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(
            f"{folder.path}: {len(found)} safetensors files but no model.safetensors.index.json.",
            "Fetch the index too; it says which tensor lies in which file.",
        )
    wanted = "Expected model.safetensors, or shards with model.safetensors.index.json."
    raise FileError(
        f"{folder.path}: no model weights in this directory.",
        folder.remedy if isinstance(folder, CachedFolder) else wanted,
    )


def _open_index(folder: Folder, entry: str, partial: bool) -> Checkpoint:
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
            f"{index}: {len(missing)} of {len(names)} shards are missing:\n"
            + listed(ascii(name) for name in missing),
            folder.remedy,
        )
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}
    metadata: dict[str, str] = {}
    notes = []
    for name, (found, own_metadata) in _read_files(folder, sorted(names)):
        metadata = metadata or own_metadata
        # The index decides; a tensor it does not know is kept, one it places elsewhere is not.
        here = {t: info for t, info in found.items() if weight_map.get(t, name) == name}
        unmapped = [t for t in here if t not in weight_map]
        if unmapped:
            notes.append(f"{name} holds {len(unmapped)} tensors the index does not list")
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
            f"{index}: {len(absent)} tensors are not in the shard the index names:\n"
            f"{listed(wanted)}",
            "Index and shards do not belong together; fetch both again.",
        )
    return Checkpoint(folder.path, folder, {}, tensors, shards, metadata, notes)


_Header = tuple[dict[str, TensorInfo], dict[str, str]]


def _read_files(folder: Folder, names: Sequence[str]) -> Iterator[tuple[str, _Header]]:
    """The headers of shards in this order; several at a time, for the Hub is slow to answer."""
    first, *others = names
    yield first, _read_file(folder, first)
    with ThreadPoolExecutor(8) as pool:
        yield from zip(others, pool.map(lambda name: _read_file(folder, name), others), strict=True)


def _read_file(folder: Folder, name: str) -> _Header:
    path = folder.path / name
    if path.suffix not in _TORCH_SUFFIXES:
        with folder.reading(name) as (stream, size):
            return parse_header(path, stream, size)
    folder.fetch([name])  # what a torch file holds cannot be told from its beginning
    tensors, top = read_pickled(path)
    if top != "dict":
        raise BaseError(f"{path}: its top object is a {top}, not named weights.", "Check the file.")
    return tensors, {}


def _output_name(shard: str) -> str:
    if Path(shard).suffix in _TORCH_SUFFIXES:
        return Path(shard.replace("pytorch_model", "model")).with_suffix(".safetensors").name
    return shard


def refuse_quantised(
    base: Checkpoint,
    role: str = "base",
    hint: str = "Merge into the unquantised base this one was made from, then quantise the result.",
) -> None:
    """Raise BaseError where the weights are stored quantised, by config or by their tensors."""
    method = base.config.get("quantization_config")
    if not method:
        nested = [v for v in base.config.values() if isinstance(v, dict)]
        found = [v.get("quantization_config") for v in nested]
        method = next((settings for settings in found if settings), {})
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise BaseError(
            f"{base.label}: a quantised {role} (quantization_config: {name or method}). "
            "Its packed weights cannot be computed with.",
            hint,
        )
    packed = [n for n in base.tensors if _QUANTISED.search(n)]
    packed += [n for n, t in base.tensors.items() if n.endswith(".weight") and not t.is_float]
    if packed:
        kinds = Counter(base.tensors[n].dtype for n in packed).most_common(1)[0][0]
        raise BaseError(
            f"{base.label}: a quantised {role}: {len(packed)} tensors such as {packed[0]!r} "
            f"({kinds}) hold packed weights or their scales.",
            hint,
        )
