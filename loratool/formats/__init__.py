"""Adapter dialects on disk. `read_adapter` opens whatever a user points at and says what it is."""

from __future__ import annotations

import re
from pathlib import Path

from loratool.adapter import Adapter
from loratool.checkpoint.address import other_reading
from loratool.checkpoint.folder import CachedFolder, Folder
from loratool.checkpoint.header import parse_header
from loratool.checkpoint.hub import locate
from loratool.checkpoint.pickled import read_pickled
from loratool.errors import AdapterError, FileError, nearest
from loratool.formats.peft import fill_adapter
from loratool.formats.recognise import recognise

#: Names of weight files in an adapter directory, the first that exists is read.
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")

CONFIG = "adapter_config.json"

_TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def read_adapter(source: str | Path) -> Adapter:
    """Read the headers of an adapter directory or file; no tensor data is read.

    The result's `format` is "peft" where the modules could be read; anything else that is readable
    is named by `format` and `description`. Raises FileError for what is damaged or not there.
    """
    place = locate(source)
    folder, name = place.folder, place.file or _find_weights(place.folder, source)
    beside = name.rpartition("/")[0]
    config_file = f"{beside}/{CONFIG}" if beside else CONFIG
    config = folder.json(config_file) if folder.has(config_file) else {}
    weights = folder.path / name
    if weights.suffix in _TORCH_SUFFIXES:
        folder.fetch([name])  # what a torch file holds cannot be told from its beginning
        tensors, top = read_pickled(weights)
        metadata: dict[str, str] = {}
    else:
        with folder.reading(name) as (stream, size):
            tensors, metadata = parse_header(weights, stream, size)
        top = "dict"
    code, words = recognise(tensors, config, top)
    adapter = Adapter(place.path, weights, folder, code, words, tensors, config, metadata)
    if code == "peft":
        fill_adapter(adapter)
    return adapter


def read_lora(source: str | Path) -> Adapter:
    """Like `read_adapter`, for those who need LoRA modules: anything else is an AdapterError.

    What the adapter holds is on the disk afterwards, downloaded if it must be.
    """
    adapter = read_adapter(source)
    if adapter.format != "peft":
        raise AdapterError(
            f"{adapter.weights}: this is {adapter.description}.",
            "loratool works on PEFT LoRA adapters. `loratool inspect` shows what is in the file.",
        )
    adapter.fetch()
    return adapter


def _find_weights(folder: Folder, source: str | Path) -> str:
    path = folder.path
    if not folder.is_there():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        if re.fullmatch(r"-?\d*\.?\d+", str(source)):
            raise FileError(
                f"{source}: taken for a path, and there is no such file.",
                "Options take one value each: --weight 0.5 --weight 0.7.",
            )
        raise FileError(
            f"{source}: no such file or directory.",
            f"Did you mean {path.with_name(near)}?"
            if near
            else "Check the path." + other_reading(str(source)),
        )
    for name in WEIGHT_NAMES:
        if folder.has(name):
            return name
    if folder.has("model.safetensors.index.json"):
        raise FileError(
            f"{path}: this is a base model (sharded weights), not an adapter.",
            "Name the adapter, or one of the shards to look into it.",
        )
    inside = [
        name
        for name in folder.names(depth=1)
        if Path(name).suffix in _TORCH_SUFFIXES | {".safetensors"}
        and ("/" not in name or re.fullmatch(r"[^/]+/adapter_model\.[^/]+", name))
    ]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise FileError(
            f"{path}: no {WEIGHT_NAMES[0]} in this directory.",
            f"Name one of the files in it: {', '.join(str(path / name) for name in inside[:5])}"
            + (", …" if len(inside) > 5 else "."),
        )
    wanted = f"Expected {WEIGHT_NAMES[0]} beside {CONFIG}."
    raise FileError(
        f"{path}: no adapter weights in this directory.",
        folder.remedy if isinstance(folder, CachedFolder) else wanted,
    )
