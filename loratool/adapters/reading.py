"""Adapter dialects on disk. `read_adapter` opens whatever a user points at and says what it is."""

from __future__ import annotations

from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.companions import read_companions
from loratool.adapters.dialects import WRITTEN, claimed_by
from loratool.adapters.dialects.dialect import Evidence
from loratool.adapters.files import Held, read_held
from loratool.adapters.recognise import recognise, way_out
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_ENTRIES, ADAPTER_INDICES, SHARD
from loratool.storage.folder import Location
from loratool.storage.hub.folder import locate


def read_adapter(
    source: str | Path, told: Told = NOTHING_TOLD, base: Checkpoint | None = None
) -> Adapter:
    """Read the headers of an adapter directory or file; no tensor data is read.

    `told` is what the user says of it, because the file does not, and `base` the model it goes
    into, where that is known.

    The result is `is_read` where a dialect claims it; anything else that is readable is named by
    `format` and `description`. Raises FileError for what is damaged or not there, and AdapterError
    where the file contradicts the user.
    """
    told.check()
    return adapter_at(locate(source), source, told, base)


def adapter_at(
    place: Location, source: str | Path, told: Told = NOTHING_TOLD, base: Checkpoint | None = None
) -> Adapter:
    """The same of a place that is known already; `source` is what errors call it."""
    held = read_held(place.folder, place.file, source)
    folder = held.folder
    config = folder.json(ADAPTER_CONFIG) if folder.has(ADAPTER_CONFIG) else {}
    evidence = Evidence(
        held.tensors,
        config,
        folder,
        held.entry,
        held.top,
        held.metadata,
        held.values,
        held.in_torch,
    )
    claim = claimed_by(evidence, told.dialect, told.override)
    # Adapters that no dialect claims may have a config of PEFT's all the same.
    dialect = claim[0] if claim else WRITTEN
    dialect.check(config, folder.path / ADAPTER_CONFIG)
    code, words = (claim[0].name, claim[1]) if claim else recognise(held.tensors, config, held.top)
    adapter = Adapter(
        place.path, folder.path / held.entry, folder, code, words, dict(held.tensors), config,
        held.metadata, values=held.values, told=told,
    )  # fmt: skip
    if held.names != (held.entry,):
        adapter.shards = tuple(folder.path / name for name in held.names)
    adapter.declared = dialect.declared(config)
    if place.note:
        adapter.notices.append(Notice("cache-folder", place.note, str(place.path)))
    adapter.notices += held.notices
    if claim:
        adapter.is_read = True
        if not place.file or held.entry in (*ADAPTER_ENTRIES, *ADAPTER_INDICES):
            # A file of another name, named alone, may have anything for neighbours.
            _add_companions(adapter, held)
        dialect.read(adapter, base)
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


def read_lora(
    source: str | Path, told: Told = NOTHING_TOLD, base: Checkpoint | None = None
) -> Adapter:
    """Like `read_adapter`, for those who need modules: what no dialect reads is an AdapterError.

    What the adapter holds is on the disk afterwards, downloaded if it must be.
    """
    adapter = read_adapter(source, told, base)
    if not adapter.is_read:
        raise AdapterError(
            f"{adapter.weights}: this is {adapter.description}.",
            way_out(adapter.format, source),
        )
    adapter.fetch()
    return adapter
