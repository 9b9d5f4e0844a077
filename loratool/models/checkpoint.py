"""A base model on disk: its files put together by the index, its config, its tensors by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import NO_MODEL, BaseError, FileError, listed, shown
from loratool.models.config import check_model_config
from loratool.models.layouts.native import NATIVE_TYPES, is_native, native_config
from loratool.models.rivals import rival_notes
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_CONFIG, CONFIG, PARAMS
from loratool.storage.folder import Folder, Location, origin_of
from loratool.storage.hub.folder import locate, not_there
from loratool.storage.tensors import TensorInfo
from loratool.storage.weights import entry_of, read_folder, read_one, refuse_part
from loratool.words import counted

_GIVE_MODEL = (
    "Give the model that it is for, a folder or an id on the Hub; "
    "a model comes before its adapters."
)

#: What to do about a model in llama.cpp's format.
CONVERT_GGUF = (
    "Take the Hugging Face model that it was made from, or convert it first: "
    "from_pretrained(…, gguf_file=…) and save_pretrained of transformers."
)

#: How the names of trained tensors end; buffers may well be empty.
_PARAMETER = re.compile(r"(weight|bias|_proj|_embeddings?)$")


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
        return self.config.get("model_type") or ""

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.disk_bytes for t in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({file for t in self.tensors.values() for file in t.files})

    @property
    def notices(self) -> list[Notice]:
        """What is odd about its files."""
        return [Notice("base-note", note, self.label) for note in self.notes]

    def fetch(self, tensors: Iterable[str] | None = None) -> None:
        """See to it that the files of these tensors, or of all, are on this disk."""
        names = self.tensors if tensors is None else tensors
        self.folder.fetch({file.name for name in names for file in self.tensors[name].files})

    def identity(self) -> str:
        """sha256 over names, dtypes, shapes and sizes: which checkpoint this is, from headers."""
        lines = sorted(f"{t.name} {t.dtype} {list(t.shape)}" for t in self.tensors.values())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_checkpoint(source: str | Path, partial: bool = False) -> Checkpoint:
    """Read the headers of a base model: a directory, or one weights file.

    With `partial` a directory may lack some of the shards in its index, but not all, and a file may
    be one shard of several.

    Raises FileError for what is missing or damaged, BaseError for what is no base model.
    """
    return checkpoint_at(locate(source), source, partial)


def checkpoint_at(place: Location, source: str | Path, partial: bool = False) -> Checkpoint:
    """The same of a place that is known already; `source` is what errors call it."""
    folder = place.folder
    if place.file:
        if place.file.endswith(".json"):
            raise FileError(
                f"{place.path}: this describes a model and holds no weights.",
                f"Give the directory: {folder.path}.",
            )
        _refuse_foreign(folder, place.file)
        if not partial:
            refuse_part(folder, place.file)
        weights = read_one(folder, place.file)
    elif folder.is_there():
        if entry_of(folder) is None and folder.has(ADAPTER_CONFIG):
            raise BaseError(f"{folder.path}: {NO_MODEL}", _GIVE_MODEL)
        if entry_of(folder) is None:
            names = folder.names(depth=0)
            if not any(name.endswith(".safetensors") for name in names):
                for name in names:
                    _refuse_foreign(folder, name)
        weights = read_folder(folder, partial)
        weights.notes += rival_notes(folder, weights.tensors)
    else:
        raise not_there(source, place.path)
    if not weights.tensors:
        raise BaseError(f"{source}: the base holds no tensors.", "Check the path.")
    if "__metadata__" in weights.tensors:
        raise FileError(
            f"{source}: a tensor is called __metadata__.", "Safetensors cannot hold it."
        )
    if any(".lora_A" in name or ".lora_embedding_A" in name for name in weights.tensors):
        raise BaseError(f"{source}: {NO_MODEL}", _GIVE_MODEL)
    config = config_in(folder, weights.tensors)
    weights.notes += [place.note] * bool(place.note)
    return Checkpoint(
        place.path, folder, config, weights.tensors, weights.shards, weights.metadata, weights.notes
    )


def config_in(folder: Folder, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the files of a model with these tensors say of it; {} where they say nothing."""
    config = folder.json(CONFIG) if folder.has(CONFIG) else {}
    check_model_config(config, folder.path / CONFIG)
    if config.get("model_type") in NATIVE_TYPES and is_native(tensors):
        params = folder.json(PARAMS) if folder.has(PARAMS) else None
        config = native_config(config, params, tensors, folder.path)
    return config


def _refuse_foreign(folder: Folder, name: str) -> None:
    """Raise BaseError for a file that holds a whole quantised model in a form of its own."""
    if name.endswith(".gguf"):
        raise BaseError(f"{folder.path / name}: a GGUF base, which is not read.", CONVERT_GGUF)
    if name == "qmodel.pt":
        raise BaseError(
            f"{folder.path / name}: a model as HQQ itself saves it, in nested tables, which are "
            "not read.",
            "Save it with HQQ's save_to_safetensors, or merge into the unquantised model.",
        )


def refuse_placeholders(model: Checkpoint) -> None:
    """Raise BaseError for weights without values: ZeRO-3 leaves them of shape [0], and a model with
    them loads nowhere."""
    empty = [
        name
        for name, info in model.tensors.items()
        if info.is_float and not info.numel and _PARAMETER.search(name)
    ]
    if empty:
        raise BaseError(
            f"{model.label}: {counted(len(empty), 'weight', 'is')} empty, a placeholder as "
            "DeepSpeed ZeRO-3 leaves it when shards were not gathered before saving:\n"
            + listed(empty),
            "Save the model again from the training run (zero_to_fp32.py, or gather first).",
        )
