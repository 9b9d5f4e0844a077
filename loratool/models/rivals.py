"""A second set of weights in a model's folder: whether it holds something else."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.errors import LoraToolError
from loratool.models.layouts.names import is_legacy_buffer
from loratool.storage.filenames import MODEL_ENTRIES, NATIVE_ENTRIES
from loratool.storage.folder import Folder
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_sample
from loratool.storage.weights import entry_of, read_entry

Tensors = Mapping[str, TensorInfo]


def rival_notes(folder: Folder, taken: Tensors) -> list[str]:
    """What to say of other sets than the one that was `taken`; nothing where they hold the same."""
    entry = entry_of(folder)
    if entry is None:
        return []
    kind = MODEL_ENTRIES if entry in MODEL_ENTRIES else NATIVE_ENTRIES
    later = kind[kind.index(entry) + 1 :]
    found = [(other, _odd_one(folder, entry, taken, other)) for other in later if folder.has(other)]
    return [
        f"the folder also holds {other}, whose weights differ ({odd!a} for one); {entry} was "
        "taken, as transformers does"
        for other, odd in found
        if odd
    ]


def _odd_one(folder: Folder, entry: str, taken: Tensors, other: str) -> str | None:
    """A tensor that only one of the two sets has, or that they have with other values."""
    if other.endswith(".json"):
        weight_map = folder.json(other).get("weight_map")
        if not isinstance(weight_map, dict):
            return None
        files = {name for name in weight_map.values() if isinstance(name, str)}
        if files == {entry} or not any(folder.has(name) for name in files):
            return None
    elif folder.missing([other]):
        return None  # nothing is downloaded for a comparison
    try:
        rest = read_entry(folder, other, partial=True).tensors
    except LoraToolError:
        return None  # it cannot be what anybody loads
    for name, info in rest.items():
        if name in taken and not _alike(taken[name], info):
            return name
    return _only_in(taken, rest) or _only_in(rest, taken)


def _only_in(one: Tensors, other: Tensors) -> str | None:
    """A tensor of `one` that `other` lacks and that says something: no constant, and no copy of a
    tensor that both have (a tied head)."""
    for name, info in one.items():
        if name in other or is_legacy_buffer(name, info.shape):
            continue
        if not any(_alike(info, held) for key, held in one.items() if key in other):
            return name
    return None


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # On the Hub headers tell all there is.
    return not (one.file.is_file() and other.file.is_file()) or same_sample(one, other)
