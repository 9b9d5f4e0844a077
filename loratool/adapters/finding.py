"""Which adapter is meant by a folder: its own, the only one below, or an error that lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loratool.adapters.companions import is_companion
from loratool.adapters.dialects import claimed_by
from loratool.adapters.dialects.dialect import Evidence
from loratool.adapters.dialects.torchtune import is_original_of
from loratool.adapters.recognise import EXTRACT, recognise
from loratool.errors import FileError, LoraToolError, SeveralMeantError, listed, shown
from loratool.notices import Notice
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_ENTRIES,
    ADAPTER_INDICES,
    INDEX,
    SHARD,
    TORCHTUNE,
    WEIGHTS_SUFFIXES,
)
from loratool.storage.folder import CachedFolder, Folder
from loratool.storage.hub.folder import not_there
from loratool.storage.weights import entry_of, read_contents
from loratool.words import agreeing, by_number, counted, enumerated

#: How many folders deep adapters are looked for: OUTPUT/RUN/checkpoint-100.
_DEEPEST = 3

#: Endings of what may hold an adapter, or tensors, and is read by nobody as it is.
_PACKED = {
    ".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar", ".h5", ".hdf5", ".npy",
    ".pkl", ".pickle",
}  # fmt: skip

#: What a file is that is certainly no adapter, as `recognise` calls it.
_NO_ADAPTERS = ("optimizer-state", "base-checkpoint", "gguf-model", "diffusion-model", "empty")


def find_entry(folder: Folder, source: str | Path) -> tuple[str, list[Notice]]:
    """The entry of the adapter in a folder, and what should be said of the choice.

    Raises FileError where there is none, and where several could be meant.
    """
    path = folder.path
    if not folder.is_there():
        if re.fullmatch(r"-?\d*\.?\d+", str(source)):
            raise FileError(
                f"{source}: taken for a path, and there is no such file.",
                "Options take one value each: --weight 0.5 --weight 0.7.",
            )
        raise not_there(source, path)
    entry = usual_entry(folder)
    if entry is not None:
        return entry, []
    if folder.has(INDEX):
        raise FileError(
            f"{path}: this is a base model (sharded weights), not an adapter.",
            f"Name the adapter. {EXTRACT}",
        )
    weights = [name for name in folder.names(depth=0) if Path(name).suffix in WEIGHTS_SUFFIXES]
    here = [name for name in weights if not is_companion(name)]
    found = [*here, *_below(folder)]
    if len(found) > 1:
        found = [name for name in found if _may_be_adapter(folder, name)] or found
    found = found or weights  # an optimizer's state alone is at least called by its name
    packed = [name for name in folder.names(depth=0) if Path(name).suffix.lower() in _PACKED]
    if not found and len(packed) == 1 and not folder.missing(packed):
        found = packed  # whoever reads it says what it is, and how to unpack it
    if len(found) > 1:
        raise _several(path, source, found)
    if not found:
        raise _none(folder)
    inner = found[0].rpartition("/")[0]
    text = f"{inner} holds the only adapter in {shown(path)}, and was taken."
    return found[0], [Notice("adapter-below", text, inner)] if inner else []


def usual_entry(folder: Folder) -> str | None:
    """The entry of an adapter by the names that adapters usually have; None without one."""
    of_torchtune = [name for name in folder.names(depth=0) if TORCHTUNE.fullmatch(name)]
    for name in (*ADAPTER_ENTRIES, *ADAPTER_INDICES):
        if folder.has(name):
            return _exported_from(folder, name, of_torchtune) or name
    if len(of_torchtune) == 1:
        return of_torchtune[0]
    named = folder.has(ADAPTER_CONFIG)
    for index in (INDEX, "pytorch_model.bin.index.json") if named else ():
        # A trainer that saves "the model" in shards names an adapter's like a model's.
        weight_map = folder.json(index).get("weight_map") if folder.has(index) else None
        if isinstance(weight_map, dict) and any("lora_" in str(key) for key in weight_map):
            return index
    return _first_shard(folder.names(depth=0), "" if named else "adapter")


def _exported_from(folder: Folder, entry: str, candidates: list[str]) -> str | None:
    """The one of torchtune's files that `entry` is its export of; None where it is no export."""
    exported = read_contents(folder, entry).tensors if candidates else {}
    folder.fetch([entry] * bool(candidates))
    for name in candidates:
        with suppress(FileError):  # a damaged file is no reason to refuse the other one
            if is_original_of(read_contents(folder, name).tensors, exported):
                return name
    return None


def _first_shard(names: list[str], stem: str) -> str | None:
    """The first of numbered shards whose names begin so, safetensors before others; None if there
    are none, or several sets."""
    sets: dict[str, dict[tuple[str, str], str]] = {".safetensors": {}, ".bin": {}}
    for name in sorted(names, reverse=True):
        shard = SHARD.fullmatch(name)
        if shard and shard["stem"].startswith(stem) and int(shard["count"]) > 1:
            sets[Path(name).suffix][shard["stem"], shard["count"]] = name
    found = next((kind for kind in sets.values() if kind), {})
    return next(iter(found.values())) if len(found) == 1 else None


def _folders(folder: Folder, depth: int) -> list[str]:
    """The folders with weights that are so deep below; hidden ones are left out."""
    return sorted({
        inner
        for name in folder.names(depth)
        if (inner := name.rpartition("/")[0]).count("/") == depth - 1
        and inner
        and (Path(name).suffix in WEIGHTS_SUFFIXES or name.endswith(".index.json"))
    })  # fmt: skip


def _below(folder: Folder) -> list[str]:
    """The entries of adapters in the folders below; what lies in the folder of one is its own."""
    found: dict[str, str] = {}
    for depth in range(1, _DEEPEST + 1):
        for inner in _folders(folder, depth):
            parents = (inner[:at] for at, letter in enumerate(inner) if letter == "/")
            entry = None if any(p in found for p in parents) else usual_entry(folder.inside(inner))
            if entry is not None:
                found[inner] = f"{inner}/{entry}"
    return list(found.values())


def _may_be_adapter(folder: Folder, name: str) -> bool:
    """Whether a file that lies among others is not certainly something else, by its header."""
    if "/" in name or folder.missing([name]):
        return True  # found by its usual name; and nothing is downloaded to choose
    try:
        held = read_contents(folder, name)
        evidence = Evidence(
            held.tensors, {}, folder, name, held.top, held.metadata, held.values,
            held.container == "torch",
        )  # fmt: skip
        claim = claimed_by(evidence)
    except LoraToolError:
        return True
    return claim is not None or recognise(held.tensors, {}, held.top)[0] not in _NO_ADAPTERS


def _several(path: Path, source: str | Path, entries: Sequence[str]) -> FileError:
    names = sorted((name.rpartition("/")[0] or name for name in entries), key=by_number)
    in_a_row = len({re.sub(r"\d+", "#", name) for name in names}) == 1
    return SeveralMeantError(
        f"{path}: {counted(len(names), 'adapter')} could be meant:\n{listed(names, shown=8)}",
        "Name one of them. The last:" if in_a_row else "Name one of them, for instance:",
        source,
        path / names[-1 if in_a_row else 0],
    )


def _none(folder: Folder) -> FileError:
    """The error for a folder without an adapter, by what is there instead."""
    path = folder.path
    if isinstance(folder, CachedFolder):
        return FileError(f"{path}: no adapter weights in this directory.", folder.remedy)
    names = folder.names(depth=2)
    in_parts = sorted({n.rpartition("/")[0] or "." for n in names if n.endswith(".distcp")})
    if in_parts:
        return FileError(
            f"{path}: no adapter weights in this directory, but a checkpoint that each process of "
            f"a training run saved its part of ({enumerated(in_parts, 3)}, .distcp).",
            f"Put it together: accelerate merge-weights {path / in_parts[-1]} OUT, or save the "
            "adapter again with save_pretrained.",
        )
    zero = sorted({n.rpartition("/")[0] or "." for n in names if n.endswith("_optim_states.pt")})
    if zero:
        return FileError(
            f"{path}: no adapter weights in this directory, but a checkpoint of DeepSpeed "
            f"({enumerated(zero, 3)}).",
            "Put it together: python zero_to_fp32.py CHECKPOINT OUT (the script lies beside it), "
            "or save the adapter again with save_pretrained.",
        )
    models = [name for name in _folders(folder, 1) if entry_of(folder.inside(name)) is not None]
    if models:
        what = "a whole model" if len(models) == 1 else "whole models"
        models.sort(key=by_number)
        return FileError(
            f"{path}: no adapter in this directory; {enumerated(models, 3)} "
            f"{agreeing(len(models), 'is')} {what}.",
            EXTRACT,
        )
    if folder.has(ADAPTER_CONFIG):
        return FileError(
            f"{path}: {ADAPTER_CONFIG} is here, and the weights ({ADAPTER_ENTRIES[0]}) are not.",
            "Fetch them too: hf download ORG/NAME --local-dir DIR, or git lfs pull in a clone.",
        )
    return FileError(
        f"{path}: no adapter weights in this directory.",
        f"Expected {ADAPTER_ENTRIES[0]} beside {ADAPTER_CONFIG}.",
    )
