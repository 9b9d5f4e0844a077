"""A base whose layers are copied, as PEFT's layer_replication makes one in memory.

Ranges [start, end) of the base's layers, one after the other, are the layers of the new model; an
adapter counts these. The copies are the same bytes of the same files, so nothing is read to make
them. What config.json says of single layers has to be known to be copied too.
Source: peft/tuners/tuners_utils.py (`replicate_layers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from loratool.adapters.adapter import Adapter
from loratool.errors import MatchError, UsageError, listed
from loratool.models.checkpoint import Checkpoint
from loratool.models.config import layer_count, lists_by_layer, settings_by_layer
from loratool.storage.filenames import shard_names
from loratool.storage.tensors import TensorInfo

#: Where PEFT finds layers: `[model.]…layers`, `[bert.]encoder.layer` or `h`.
_LAYER = re.compile(
    r"(?P<at>(?:model\.)*layers|(?:model\.)*(?:bert\.)?encoder\.layer|(?:transformer\.)?h)"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)
#: No model has more.
_MOST_LAYERS = 10_000


@dataclass
class Replicated(Checkpoint):
    """`made_of` with its layers in the `order` of the new model: their old numbers."""

    made_of: Checkpoint | None = None
    order: tuple[int, ...] = field(default=())


def original(base: Checkpoint) -> Checkpoint:
    """The base as it lies there, without copies."""
    made_of = base.made_of if isinstance(base, Replicated) else None
    return made_of or base


def replicated(base: Checkpoint, adapters: Sequence[Adapter]) -> Replicated:
    """The base with its layers copied as the adapters' configs say.

    Raises UsageError where none says so, MatchError where the base has other layers.
    """
    wanted = {adapter.declared.layer_ranges for adapter in adapters}
    if wanted == {()}:
        raise UsageError(
            "No adapter was trained on copied layers (layer_replication), so there is nothing to "
            "copy.",
            "Omit --replicate-layers.",
        )
    if len(wanted) > 1:
        raise MatchError(
            "The adapters were trained on models of different layers, so one number means two "
            f"layers:\n{listed(_said(adapter) for adapter in adapters)}",
            "Merge those of one kind.",
        )
    (ranges,) = wanted
    count = _count_layers(base)
    last, total = max(end for _, end in ranges), sum(end - start for start, end in ranges)
    if last > count or total > _MOST_LAYERS:
        raise MatchError(
            f"{base.label} has {count} layers, and layer_replication of the adapter wants "
            f"{total} of 0…{last - 1}.",
            "Check that this is the base.",
        )
    return _copied(base, tuple(n for start, end in ranges for n in range(start, end)))


def _said(adapter: Adapter) -> str:
    ranges = [list(r) for r in adapter.declared.layer_ranges]
    return f"{adapter.label}: {ranges or 'the layers of the base'}"


def _count_layers(base: Checkpoint) -> int:
    """How many layers there are. Raises MatchError where copies of them are not understood."""
    found = [m for m in map(_LAYER.fullmatch, base.tensors) if m]
    numbers = {int(m["number"]) for m in found}
    places = {m["at"] for m in found}
    reason = ""
    if len(places) != 1:
        reason = "its layers are not called as PEFT finds them (layers, encoder.layer or h)"
    elif numbers != set(range(len(numbers))) or layer_count(base.config) != len(numbers):
        said = layer_count(base.config)
        reason = f"its files have {len(numbers)} layers, and its config.json says {said}"
    else:
        odd = settings_by_layer(base.config)
        if odd:
            reason = (
                "its config.json makes layers differ by their number, in a way that is not known: "
                + ", ".join(odd)
            )
        elif len(set(_contents(base).values())) > 1 and not lists_by_layer(base.config):
            reason = (
                "they are not alike, and no list in its config.json says which is of which kind"
            )
    if reason:
        raise MatchError(
            f"{base.label}: its layers cannot be copied: {reason}.",
            "Build the model with copied layers yourself, save it, and remove layer_replication "
            "from adapter_config.json.",
        )
    return len(numbers)


def _contents(base: Checkpoint) -> dict[int, frozenset[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of each layer's tensors."""
    found: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name, info in base.tensors.items():
        layer = _LAYER.fullmatch(name)
        if layer:
            found.setdefault(int(layer["number"]), set()).add((layer["rest"], info.shape))
    return {number: frozenset(tensors) for number, tensors in found.items()}


def _copied(base: Checkpoint, order: tuple[int, ...]) -> Replicated:
    places: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        places.setdefault(old, []).append(new)
    tensors: dict[str, TensorInfo] = {}
    parts: list[list[str]] = []
    for names in base.shards.values():
        # Further copies get shards of their own, so that none is larger than it was.
        copies: list[list[str]] = [[]]
        for name in names:
            found = _LAYER.fullmatch(name)
            called = [name]
            if found:
                numbers = places.get(int(found["number"]), [])
                called = [f"{found['at']}.{n}.{found['rest']}" for n in numbers]
            for turn, copy in enumerate(called):
                tensors[copy] = base.tensors[name].renamed(copy)
                copies += [[]] if turn == len(copies) else []
                copies[turn].append(copy)
        parts += [part for part in copies if part]
    shards = dict(zip(_file_names(base, len(parts)), parts, strict=True))
    return Replicated(
        base.source, base.folder, base.config, tensors, shards, base.metadata, base.notes, base,
        order,
    )  # fmt: skip


def _file_names(base: Checkpoint, count: int) -> list[str]:
    if count == len(base.shards):
        return list(base.shards)
    return shard_names(count)
