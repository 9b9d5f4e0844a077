"""Adapter dialects on disk. `read_adapter` opens whatever a user points at and says what it is."""

from __future__ import annotations

import re
from pathlib import Path

from loratool.adapter import Adapter
from loratool.checkpoint.config import read_json
from loratool.checkpoint.header import read_header
from loratool.checkpoint.pickled import read_pickled
from loratool.errors import AdapterError, FileError, nearest
from loratool.formats.peft import fill_adapter
from loratool.formats.recognise import recognise

#: Names of weight files in an adapter directory, the first that exists is read.
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")

_TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def read_adapter(source: str | Path) -> Adapter:
    """Read the headers of an adapter directory or file; no tensor data is read.

    The result's `format` is "peft" where the modules could be read; anything else that is readable
    is named by `format` and `description`. Raises FileError for what is damaged or not there.
    """
    source = Path(source)
    weights = _find_weights(source)
    config_file = weights.with_name("adapter_config.json")
    config = read_json(config_file) if config_file.is_file() else {}
    if weights.suffix in _TORCH_SUFFIXES:
        tensors, top = read_pickled(weights)
        metadata: dict[str, str] = {}
    else:
        tensors, metadata = read_header(weights)
        top = "dict"
    code, words = recognise(tensors, config, top)
    adapter = Adapter(source, weights, code, words, tensors, config, metadata)
    if code == "peft":
        fill_adapter(adapter)
    return adapter


def read_lora(source: str | Path) -> Adapter:
    """Like `read_adapter`, for those who need LoRA modules: anything else is an AdapterError."""
    adapter = read_adapter(source)
    if adapter.format != "peft":
        raise AdapterError(
            f"{adapter.weights}: this is {adapter.description}.",
            "loratool works on PEFT LoRA adapters. `loratool inspect` shows what is in the file.",
        )
    return adapter


def _find_weights(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        near = nearest(source.name, siblings)
        if re.fullmatch(r"-?\d*\.?\d+", str(source)):
            raise FileError(
                f"{source}: taken for a path, and there is no such file.",
                "Options take one value each: --weight 0.5 --weight 0.7.",
            )
        raise FileError(
            f"{source}: no such file or directory.",
            f"Did you mean {source.with_name(near)}?" if near else "Check the path.",
        )
    for name in WEIGHT_NAMES:
        if (source / name).is_file():
            return source / name
    if (source / "model.safetensors.index.json").is_file():
        raise FileError(
            f"{source}: this is a base model (sharded weights), not an adapter.",
            "Name the adapter, or one of the shards to look into it.",
        )
    inside = sorted(
        str(p.relative_to(source))
        for p in [*source.glob("*"), *source.glob("*/adapter_model.*")]
        if p.suffix in _TORCH_SUFFIXES | {".safetensors"}
    )
    if len(inside) == 1:
        return source / inside[0]
    if inside:
        raise FileError(
            f"{source}: no {WEIGHT_NAMES[0]} in this directory.",
            f"Name one of the files in it: {', '.join(inside[:5])}"
            + (", …" if len(inside) > 5 else "."),
        )
    raise FileError(
        f"{source}: no adapter weights in this directory.",
        f"Expected {WEIGHT_NAMES[0]} beside adapter_config.json.",
    )
