"""A unit of a folder read by its headers, and what they say as an entry of the catalogue."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import adapter_at
from loratool.cataloguing.entry import CatalogEntry
from loratool.cataloguing.sampling import beside_tensors, effect_of, likeness, outline_of
from loratool.cataloguing.training import (
    declared_base,
    declared_family,
    declared_rank,
    frequent_tags,
    iso_time,
    training_end,
    trigger_words,
)
from loratool.cataloguing.units import Unit
from loratool.cataloguing.walking import FilesIn
from loratool.errors import (
    AdapterError,
    BaseError,
    FileError,
    LoraToolError,
    TruncatedError,
    shown,
)
from loratool.models.checkpoint import Checkpoint, checkpoint_at
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.declared import quantisation_of
from loratool.storage.filenames import GGUF_SUFFIX, SHARD, TORCH_SUFFIXES
from loratool.storage.folder import Location
from loratool.storage.tensors import FilePool, TensorInfo

#: What is recognised and no adapter: whole models, and what is neither.
_MODELS = {"base-checkpoint", "gguf-model"}
_NEITHER = {"empty", "optimizer-state", "unknown", "bare-tensor", "control-vector",
            "textual-inversion"}  # fmt: skip
#: How the files begin that torch saves: a zip archive, or a pickle.
_TORCH_STARTS = (b"PK\x03\x04", b"\x80")
_FLOATS = {"F16", "BF16", "F32", "F64"}


def entry_of_unit(place: FilesIn, unit: Unit) -> CatalogEntry | None:
    """The entry of a unit; None for a file that holds no weights, whatever its name ends in.

    What cannot be read is an entry too, with what is wrong.
    """
    path = "/".join(part for part in (place.path, unit.file) if part) or "."
    entry = CatalogEntry(path, shown(place.folder.path / unit.file), "other")
    if unit.guess in ("adapter", "model"):
        entry.kind = "adapter" if unit.guess == "adapter" else "model"
    try:
        if unit.guess == "file" and _is_something_else(place, unit.file):
            return None
        _date(entry, place, [place.folder.path / unit.file] if unit.file else _weights(place))
        if not _describe(entry, place, unit):
            return None
    except LoraToolError as error:
        _set_wrong(entry, error)
    except OSError as error:
        _set_wrong(entry, FileError(f"{entry.label}: it cannot be read ({error.strerror})."))
    except (RecursionError, MemoryError, ValueError, ArithmeticError, LookupError) as error:
        # Nobody foresaw it; the other entries are listed all the same.
        _set_wrong(entry, LoraToolError(f"{entry.label}: not read ({type(error).__name__})."))
    return entry


def opened(place: FilesIn, unit: Unit) -> Adapter | Checkpoint:
    """The adapter or the model that a unit is, as far as its names and its config tell."""
    location = Location(place.folder, unit.file)
    where = location.path
    if unit.guess != "model" or unit.file:
        return adapter_at(location, where)
    try:
        model = checkpoint_at(location, where)
    except BaseError:
        adapter = adapter_at(location, where)
        if not adapter.is_read:
            raise
        return adapter
    if not model_family(model):
        # Somebody may have called an adapter like a model.
        (file,) = model.files if len(model.files) == 1 else (None,)
        if file is not None:
            adapter = adapter_at(Location(place.folder, file.name), file)
            if adapter.is_read or adapter.format not in _MODELS | _NEITHER:
                return adapter
    return model


def model_family(model: Checkpoint) -> str:
    """The architecture that a config names: of transformers, of diffusers, or a class."""
    named = model.model_type or model.config.get("_class_name")
    classes = model.config.get("architectures") or [""]
    return str(named or classes[0])


def _set_wrong(entry: CatalogEntry, error: LoraToolError) -> None:
    if isinstance(error, TruncatedError):
        entry.state = "damaged"
    elif isinstance(error, FileError | AdapterError | BaseError):
        entry.state = "unreadable"
    else:
        entry.state = "not-read"
    entry.message = error.message


def _is_something_else(place: FilesIn, file: str) -> bool:
    """Whether a file is no weights although it ends like those that torch saves."""
    if os.path.splitext(file)[1] not in TORCH_SUFFIXES or place.folder.missing([file]):
        return False
    (start,) = place.folder.ranges(file, [(0, 4)])
    return bool(start) and not start.startswith(_TORCH_STARTS)


def _describe(entry: CatalogEntry, place: FilesIn, unit: Unit) -> bool:
    """Fill an entry from headers; False for what is nobody's to list."""
    shard = SHARD.fullmatch(unit.file)
    if unit.guess == "model" and shard:
        raise FileError(
            f"{entry.label}: one of {int(shard['count'])} shards, and no index says what is in "
            "which."
        )
    found = opened(place, unit)
    if isinstance(found, Checkpoint):
        _fill_from_model(entry, found)
        _date(entry, place, found.files)
        return True
    if found.format in _NEITHER and not unit.file.endswith(".safetensors") and unit.file:
        return False
    if found.format == "optimizer-state":
        return False
    _fill_from_adapter(entry, found)
    _date(entry, place, found.files, training_end(found.metadata))
    return True


def _fill_from_model(entry: CatalogEntry, model: Checkpoint) -> None:
    entry.kind, entry.dialect, entry.description = "model", "", "model weights"
    entry.family = model_family(model)
    entry.base = str(model.config.get("_name_or_path") or "")
    _fill_from_tensors(entry, model.tensors.values())
    here = all(file.is_file() for file in model.files)
    entry.quantised = quantisation_of(model).method
    if entry.quantised or not entry.dtypes.keys() <= _FLOATS:
        entry.parameters = None
        if here:
            with suppress(LoraToolError):  # of an unread format the number is not known
                entry.parameters = dequantised(model).parameters
    if here:
        with FilePool() as files:
            entry.likeness = likeness("model", model.tensors, [], files)


def _fill_from_adapter(entry: CatalogEntry, adapter: Adapter) -> None:
    metadata, declared = adapter.metadata, adapter.declared
    entry.dialect, entry.description = adapter.format, adapter.description
    entry.kind = "adapter" if adapter.is_read or adapter.format not in _NEITHER else "other"
    if adapter.format in _MODELS:
        entry.kind = "model"
    entry.base = declared.base_name or declared_base(metadata)
    entry.family = declared_family(metadata) or _gguf_family(adapter) or declared.model_class
    entry.ranks = sorted({module.rank for module in adapter.modules.values()})
    entry.scales = sorted({m.scale for m in adapter.modules.values() if m.scale is not None})
    if adapter.is_read:
        entry.modules = len(adapter.modules) + len(adapter.functions)
    elif entry.kind == "adapter":
        entry.state = "recognised"
        entry.ranks = [r for r in (declared_rank(metadata),) if r is not None]
    frozen = {info.name for info in adapter.frozen.values()}
    _fill_from_tensors(entry, (t for t in adapter.tensors.values() if t.name not in frozen))
    entry.triggers, entry.tags = trigger_words(metadata), frequent_tags(metadata)
    entry.refused = sorted({notice.code for notice in adapter.notices if notice.refused})
    if entry.refused:
        entry.state = "refused"
        entry.message = next(n.message for n in adapter.notices if n.refused)
    if adapter.format == "empty":
        entry.state, entry.message = "does-nothing", f"{entry.label}: it holds no tensors."
    if adapter.is_here:
        _look_at_values(entry, adapter)


def _look_at_values(entry: CatalogEntry, adapter: Adapter) -> None:
    with FilePool() as files:
        entry.likeness = likeness(entry.kind, adapter.tensors, beside_tensors(adapter), files)
        entry.outline = outline_of(adapter) if adapter.is_read else ""
        if entry.kind != "adapter" or not adapter.is_read:
            return
        effect = effect_of(adapter, files)
    entry.looked_at = effect is not None
    if effect:
        entry.state = effect
        entry.message = (
            f"{entry.label}: a factor of every module is zero, or the scale is."
            if effect == "does-nothing"
            else f"{entry.label}: it holds NaN or infinity."
        )


def _gguf_family(adapter: Adapter) -> str:
    return str(adapter.values.get("general.architecture") or "")


def _fill_from_tensors(entry: CatalogEntry, tensors: Iterable[TensorInfo]) -> None:
    dtypes: Counter[str] = Counter()
    parameters = nbytes = 0
    for info in tensors:
        dtypes[info.dtype] += 1
        parameters += info.numel
        nbytes += info.disk_bytes
    entry.dtypes = dict(dtypes.most_common())
    entry.parameters, entry.bytes = parameters, nbytes


def _weights(place: FilesIn) -> list[Path]:
    return [
        place.folder.path / name
        for name in place.names
        if name.endswith((".safetensors", ".npz", GGUF_SUFFIX, *TORCH_SUFFIXES))
    ]


def _date(entry: CatalogEntry, place: FilesIn, files: Iterable[Path], told: Any = None) -> None:
    """When it was trained, or at least when its files were written."""
    if told:
        entry.trained, entry.trained_from = told, "metadata"
    elif place.changed:
        entry.trained, entry.trained_from = place.changed, "commit"
    else:
        found = [stat for stat in map(_stat, files) if stat is not None]
        if entry.bytes is None and found:  # until a header says more
            entry.bytes = sum(stat.st_size for stat in found)
        if found:
            entry.trained = iso_time(max(stat.st_mtime for stat in found))
            entry.trained_from = "file"


def _stat(file: Path) -> os.stat_result | None:
    try:
        return os.stat(file)
    except (OSError, ValueError):
        return None
