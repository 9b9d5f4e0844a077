"""Whether a folder holds an adapter or a model: what push and card ask first."""

from __future__ import annotations

from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_ENTRIES,
    CONFIG,
    MODEL_ENTRIES,
    WEIGHTS_SUFFIXES,
)
from loratool.storage.folder import Folder

#: What a file is that is no adapter, by its names: a model, or nothing that is known.
_NO_ADAPTER = (
    "base-checkpoint", "diffusion-model", "nunchaku", "controlnet", "t2i-adapter", "unknown",
)  # fmt: skip


def adapter_in(path: Path, told: Told = NOTHING_TOLD) -> Adapter | None:
    """The adapter that a folder holds; None where it holds a model, or more than one file of
    weights without a name that says what they are."""
    folder = Folder(path)
    if any(folder.has(name) for name in (ADAPTER_CONFIG, *ADAPTER_ENTRIES)):
        return read_adapter(path, told)
    if any(folder.has(name) for name in (CONFIG, *MODEL_ENTRIES)):
        return None
    weights = [n for n in folder.names(depth=0) if Path(n).suffix in WEIGHTS_SUFFIXES]
    if len(weights) != 1:
        return None
    adapter = read_adapter(path / weights[0], told)
    return adapter if adapter.is_read or adapter.format not in _NO_ADAPTER else None
