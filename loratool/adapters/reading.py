"""Adapter dialects on disk. `read_adapter` opens whatever a user points at and says what it is."""

from __future__ import annotations

import re
from pathlib import Path

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects import WRITTEN, claimed_by
from loratool.adapters.recognise import recognise
from loratool.errors import AdapterError, FileError
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_ENTRIES, INDEX, TORCH_SUFFIXES
from loratool.storage.folder import CachedFolder, Folder
from loratool.storage.hub.folder import locate, not_there
from loratool.storage.jsonfile import read_json
from loratool.storage.weights import read_contents


def read_adapter(source: str | Path) -> Adapter:
    """Read the headers of an adapter directory or file; no tensor data is read.

    The result is `is_read` where a dialect claims it; anything else that is readable is named by
    `format` and `description`. Raises FileError for what is damaged or not there.
    """
    place = locate(source)
    folder, name = place.folder, place.file or _find_weights(place.folder, source)
    beside = name.rpartition("/")[0]
    config_file = f"{beside}/{ADAPTER_CONFIG}" if beside else ADAPTER_CONFIG
    config = folder.json(config_file) if folder.has(config_file) else {}
    weights = folder.path / name
    tensors, metadata, top = read_contents(folder, name)
    claim = claimed_by(tensors, config, top)
    code, words = (claim[0].name, claim[1]) if claim else recognise(tensors, config, top)
    adapter = Adapter(place.path, weights, folder, code, words, tensors, config, metadata)
    # Adapters that are no LoRA have a config of PEFT's all the same.
    adapter.declared = (claim[0] if claim else WRITTEN).declared(config)
    if claim:
        adapter.is_read = True
        claim[0].read(adapter)
    return adapter


def declared_in(folder: Path) -> Declared:
    """What the config in a folder of this disk declares, whatever lies beside it.

    Raises FileError for one that is no JSON.
    """
    path = folder / ADAPTER_CONFIG
    return WRITTEN.declared(read_json(path)) if path.is_file() else Declared()


def read_lora(source: str | Path) -> Adapter:
    """Like `read_adapter`, for those who need LoRA modules: anything else is an AdapterError.

    What the adapter holds is on the disk afterwards, downloaded if it must be.
    """
    adapter = read_adapter(source)
    if not adapter.is_read:
        raise AdapterError(
            f"{adapter.weights}: this is {adapter.description}.",
            "loratool works on PEFT LoRA adapters. `loratool inspect` shows what is in the file.",
        )
    adapter.fetch()
    return adapter


def _find_weights(folder: Folder, source: str | Path) -> str:
    path = folder.path
    if not folder.is_there():
        if re.fullmatch(r"-?\d*\.?\d+", str(source)):
            raise FileError(
                f"{source}: taken for a path, and there is no such file.",
                "Options take one value each: --weight 0.5 --weight 0.7.",
            )
        raise not_there(source, path)
    for name in ADAPTER_ENTRIES:
        if folder.has(name):
            return name
    if folder.has(INDEX):
        raise FileError(
            f"{path}: this is a base model (sharded weights), not an adapter.",
            "Name the adapter, or one of the shards to look into it.",
        )
    inside = [
        name
        for name in folder.names(depth=1)
        if Path(name).suffix in TORCH_SUFFIXES | {".safetensors"}
        and ("/" not in name or re.fullmatch(r"[^/]+/adapter_model\.[^/]+", name))
    ]
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
