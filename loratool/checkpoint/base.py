"""A base model on disk: its files put together by the index, its config, its tensors by name."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.config import read_json
from loratool.checkpoint.header import read_header
from loratool.checkpoint.pickled import read_pickled
from loratool.checkpoint.tensors import TensorInfo
from loratool.errors import BaseError, FileError, listed, nearest

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
    the names of its tensors in file order. `directory` holds config and tokenizer.
    """

    source: Path
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, list[str]]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.resolve().name

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

    def identity(self) -> str:
        """sha256 over names, dtypes, shapes and sizes: which checkpoint this is, from headers."""
        lines = sorted(f"{t.name} {t.dtype} {list(t.shape)}" for t in self.tensors.values())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_checkpoint(source: str | Path, partial: bool = False) -> Checkpoint:
    """Read the headers of a base model: a directory, or one weights file.

    With `partial` a directory may lack some of the shards in its index, but not all.

    Raises FileError for what is missing or damaged, BaseError for what is no base model.
    """
    source = Path(source)
    if source.is_file():
        if source.suffix == ".json":
            raise FileError(
                f"{source}: this describes a model and holds no weights.",
                f"Give the directory: {source.parent}.",
            )
        tensors, metadata = _read_file(source)
        checkpoint = Checkpoint(
            source, source.parent, {}, tensors, {"model.safetensors": list(tensors)}, metadata
        )
    elif source.is_dir():
        checkpoint = _open_directory(source, partial)
    else:
        siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        near = nearest(source.name, siblings)
        raise FileError(
            f"{source}: no such file or directory.",
            f"Did you mean {source.with_name(near)}?" if near else "Check the path.",
        )
    if not checkpoint.tensors:
        raise BaseError(f"{source}: the base holds no tensors.", "Check the path.")
    if "__metadata__" in checkpoint.tensors:
        raise FileError(
            f"{source}: a tensor is called __metadata__.", "Safetensors cannot hold it."
        )
    if any(".lora_A" in name or ".lora_embedding_A" in name for name in checkpoint.tensors):
        raise BaseError(f"{source}: this is an adapter, not a base model.", _ORDER)
    config = checkpoint.directory / "config.json"
    if config.is_file():
        checkpoint.config = read_json(config)
    return checkpoint


def _open_directory(directory: Path, partial: bool) -> Checkpoint:
    entry = next((directory / n for n in _ENTRY_FILES if (directory / n).is_file()), None)
    if entry is None:
        entry = _only_weights_file(directory)
    if entry.suffix != ".json":
        tensors, metadata = _read_file(entry)
        return Checkpoint(
            directory, directory, {}, tensors, {"model.safetensors": list(tensors)}, metadata
        )
    return _open_index(directory, entry, partial)


def _only_weights_file(directory: Path) -> Path:
    if (directory / "adapter_config.json").is_file():
        raise BaseError(
            f"{directory}: this is an adapter, not a base model.",
            _ORDER,
        )
    found = sorted(p for p in directory.glob("*.safetensors") if p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(
            f"{directory}: {len(found)} safetensors files but no model.safetensors.index.json.",
            "Fetch the index too; it says which tensor lies in which file.",
        )
    raise FileError(
        f"{directory}: no model weights in this directory.",
        "Expected model.safetensors, or shards with model.safetensors.index.json.",
    )


def _open_index(directory: Path, index: Path, partial: bool) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: it has no weight_map.", "Fetch the index again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise FileError(
                f"{index}: tensor {tensor!a} is said to lie in {name!a}, outside the directory.",
                "An index names files beside itself; fetch it again from a source you trust.",
            )
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not _is_file(directory / name)]
    if partial and len(missing) < len(names):
        names = [name for name in names if name not in missing]
        weight_map = {t: name for t, name in weight_map.items() if name not in missing}
    elif missing:
        raise FileError(
            f"{index}: {len(missing)} of {len(names)} shards are missing:\n"
            + listed(ascii(name) for name in missing),
            "Finish the download.",
        )
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}
    metadata: dict[str, str] = {}
    notes = []
    for name in sorted(names):
        found, own_metadata = _read_file(directory / name)
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
    return Checkpoint(directory, directory, {}, tensors, shards, metadata, notes)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_file(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if path.suffix not in _TORCH_SUFFIXES:
        return read_header(path)
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
            f"{base.source}: a quantised {role} (quantization_config: {name or method}). "
            "Its packed weights cannot be computed with.",
            hint,
        )
    packed = [n for n in base.tensors if _QUANTISED.search(n)]
    packed += [n for n, t in base.tensors.items() if n.endswith(".weight") and not t.is_float]
    if packed:
        kinds = Counter(base.tensors[n].dtype for n in packed).most_common(1)[0][0]
        raise BaseError(
            f"{base.source}: a quantised {role}: {len(packed)} tensors such as {packed[0]!r} "
            f"({kinds}) hold packed weights or their scales.",
            hint,
        )
