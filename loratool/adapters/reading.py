"""Adapter dialects on disk. `read_adapter` opens whatever a user points at and says what it is."""

from __future__ import annotations

from pathlib import Path

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.companions import read_companions
from loratool.adapters.dialects import WRITTEN, claimed_by
from loratool.adapters.experts import flat_packing
from loratool.adapters.files import Held, read_held
from loratool.adapters.recognise import recognise
from loratool.errors import AdapterError
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_ENTRIES, ADAPTER_INDICES, SHARD
from loratool.storage.hub.folder import locate
from loratool.storage.jsonfile import read_json


def read_adapter(source: str | Path, expert_b_layout: str | None = None) -> Adapter:
    """Read the headers of an adapter directory or file; no tensor data is read.

    `expert_b_layout` is how B of expert stacks lies where the files do not tell: "rank-major" as
    PEFT's, or "grouped" as Unsloth's before unsloth-zoo 2026.9.6.

    The result is `is_read` where a dialect claims it; anything else that is readable is named by
    `format` and `description`. Raises FileError for what is damaged or not there.
    """
    layout = flat_packing(expert_b_layout)
    place = locate(source)
    held = read_held(place.folder, place.file, source)
    folder = held.folder
    config = folder.json(ADAPTER_CONFIG) if folder.has(ADAPTER_CONFIG) else {}
    # Adapters that are no LoRA have a config of PEFT's all the same.
    WRITTEN.check(config, folder.path / ADAPTER_CONFIG)
    tensors = held.tensors
    claim = claimed_by(tensors, config, held.top)
    code, words = (claim[0].name, claim[1]) if claim else recognise(tensors, config, held.top)
    adapter = Adapter(
        place.path, folder.path / held.entry, folder, code, words, dict(tensors), config,
        held.metadata,
    )  # fmt: skip
    if held.names != (held.entry,):
        adapter.shards = tuple(folder.path / name for name in held.names)
    adapter.declared = (claim[0] if claim else WRITTEN).declared(config)
    if claim:
        adapter.is_read = True
        adapter.expert_b_layout = layout
        if not place.file or held.entry in (*ADAPTER_ENTRIES, *ADAPTER_INDICES):
            # A file of another name, named alone, may have anything for neighbours.
            _add_companions(adapter, held)
        claim[0].read(adapter)
        _note_part(adapter, place.file)
    return adapter


def _add_companions(adapter: Adapter, held: Held) -> None:
    """Make what training scripts saved beside the factors a part of the adapter."""
    found = read_companions(adapter.folder, held.entry, adapter.tensors, held.names)
    adapter.tensors |= found.tensors
    adapter.companions = tuple(adapter.folder.path / name for name in found.names)
    adapter.notices += found.notices


def _note_part(adapter: Adapter, file: str) -> None:
    shard = SHARD.fullmatch(file.rpartition("/")[2])
    if shard and int(shard["count"]) > 1:
        text = (
            f"This is shard {int(shard['number'])} of {int(shard['count'])}, a part of an adapter. "
            f"Give its directory, with all shards in it: {adapter.folder.path}."
        )
        adapter.notices.append(Notice("one-shard", text, file, refused=True))


def declared_in(folder: Path) -> Declared:
    """What the config in a folder of this disk declares, whatever lies beside it.

    Raises FileError for one that is no JSON, AdapterError for a field of a wrong type.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return Declared()
    config = read_json(path)
    WRITTEN.check(config, path)
    return WRITTEN.declared(config)


def read_lora(source: str | Path, expert_b_layout: str | None = None) -> Adapter:
    """Like `read_adapter`, for those who need LoRA modules: anything else is an AdapterError.

    What the adapter holds is on the disk afterwards, downloaded if it must be.
    """
    adapter = read_adapter(source, expert_b_layout)
    if not adapter.is_read:
        raise AdapterError(
            f"{adapter.weights}: this is {adapter.description}.",
            "loratool works on PEFT LoRA adapters. `loratool inspect` shows what is in the file.",
        )
    adapter.fetch()
    return adapter
