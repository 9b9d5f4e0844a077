"""Which files of a folder are one adapter, or one model: told from their names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from loratool.adapters.companions import is_companion
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_ENTRIES,
    ADAPTER_INDICES,
    CONFIG,
    LITGPT,
    LITGPT_MERGED,
    MODEL_ENTRIES,
    NATIVE_ENTRIES,
    NATIVE_PART,
    SHARD,
    TORCHTUNE,
    WEIGHTS_SUFFIXES,
)

#: What MLX saves of an adapter while it trains, each an adapter with the config beside it.
_OF_MLX = re.compile(r"\d{7}_adapters\.(safetensors|npz)")
#: How the weights of a whole model are called, in one file or in shards.
_MODEL_STEMS = ("model", "pytorch_model", "consolidated")


@dataclass(frozen=True)
class Unit:
    """Something to be read: a folder as a whole (`file` is "") or one file of it.

    `guess` says what its name makes of it; of a loose "file" nothing is known.
    """

    file: str
    guess: Literal["adapter", "model", "file"]


def units_of(names: Collection[str]) -> list[Unit]:
    """The adapters and models among the files of one folder, each once."""
    left = {name for name in names if _is_weights(name)}
    adapter, own = _adapter_among(names, left)
    left -= own
    model, parts = _model_among(names, left)
    left -= parts
    units = [Unit("", "adapter")] if adapter == "." else []
    units += [Unit(adapter, "adapter")] if adapter not in ("", ".") else []
    units += [Unit("" if model == "." else model, "model")] if model else []
    sets, left = _shard_sets(names, left)
    if sets and not units and ADAPTER_CONFIG in names:
        return [Unit("", "adapter"), *(Unit(name, "file") for name in sorted(left))]
    units += [Unit(name, "model") for name in sets]
    if len(left) == 1 and not units and CONFIG in names and next(iter(left)).endswith("tensors"):
        return [Unit("", "model")]  # a model in one file of a name of its own
    if not adapter and ADAPTER_CONFIG in names and len(left) == 1 and not units:
        return [Unit("", "adapter")]
    return units + [Unit(name, "file") for name in sorted(left)]


def _is_weights(name: str) -> bool:
    if os.path.splitext(name)[1] not in WEIGHTS_SUFFIXES:
        return False
    return not is_companion(name) or _OF_MLX.fullmatch(name) is not None


def _adapter_among(names: Collection[str], weights: set[str]) -> tuple[str, set[str]]:
    """The adapter that a folder is known for: "." for the folder itself, a file of it where others
    lie beside that, or ""; and the files that are parts of it."""
    entries = [name for name in (*ADAPTER_ENTRIES, *ADAPTER_INDICES) if name in names]
    tunes = {name for name in weights if TORCHTUNE.fullmatch(name)}
    shards = {n for n in weights if n.startswith("adapter") and SHARD.fullmatch(n)}
    own = {*entries, *tunes, *shards}
    if not entries and not shards and len(tunes) != 1:
        return "", set()
    if LITGPT in names:
        own.add(LITGPT_MERGED)
    alone = not weights - own
    if alone or ADAPTER_CONFIG in names or not entries:
        return ".", own
    return entries[0], {entries[0]}


def _model_among(names: Collection[str], weights: set[str]) -> tuple[str, set[str]]:
    """The same of a model."""
    entries = {name for name in (*MODEL_ENTRIES, *NATIVE_ENTRIES) if name in names}
    if not entries:
        return "", set()
    own = set(entries)
    for name in weights:
        shard = SHARD.fullmatch(name)
        if (shard and shard["stem"] in _MODEL_STEMS) or NATIVE_PART.fullmatch(name):
            own.add(name)
    return ".", own


def _shard_sets(names: Collection[str], weights: set[str]) -> tuple[list[str], set[str]]:
    """Sets of shards under other names, each by its index or its first shard; and the files that
    are in none."""
    sets: dict[tuple[str, str, str], list[str]] = {}
    left = set()
    for name in sorted(weights):
        shard = SHARD.fullmatch(name)
        if shard and int(shard["count"]) > 1:
            sets.setdefault((shard["stem"], shard["count"], shard[4]), []).append(name)
        else:
            left.add(name)
    found = []
    for (stem, _, suffix), members in sets.items():
        index = f"{stem}.{suffix}.index.json"
        found.append(index if index in names else members[0])
    return found, left
