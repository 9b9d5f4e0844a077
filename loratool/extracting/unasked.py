"""What to say of norms, biases and embeddings that changed, and that nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loratool.errors import listed
from loratool.extracting.selection import ON_REQUEST
from loratool.notices import Notice
from loratool.paths import ranged_names
from loratool.words import counted, enumerated, percent

if TYPE_CHECKING:
    from loratool.extracting.counterparts import Counterpart
    from loratool.extracting.decomposed import Decomposed

#: How a group gets into the adapter.
OPTIONS = {"norms": "--save norms", "biases": "--save biases", "embeddings": "--embeddings"}

_SAVED = {
    "norms": "saves them whole; vLLM refuses adapters with norms, and llama.cpp drops them without "
    "a word",
    "biases": "saves them whole; vLLM refuses adapters with biases, and llama.cpp does not convert "
    "them",
}


def note_unasked(unasked: Sequence[Decomposed], total: float) -> list[Notice]:
    """A warning for each group: what is not in the adapter, its share of `total`, which is ‖ΔW‖²,
    and how to ask for it."""
    notices = []
    for group in ON_REQUEST:
        found = [f for f in unasked if f.part.group == group]
        if not found:
            continue
        parts = [f.part for f in found]
        share = percent(math.fsum(f.size.energy for f in found) / (total or 1.0))
        text = (
            f"The {group} changed and are not in the adapter: "
            f"{counted(len(found), 'tensor')}, {share} of ‖ΔW‖²:\n"
            f"{listed(ranged_names(part.name for part in parts))}\n  "
            + "\n  ".join(_ways(group, parts))
        )
        notices.append(Notice("not-saved", text, parts[0].name))
    return notices


def ways_to_ask(unasked: Sequence[Decomposed]) -> str:
    """How all of these get into the adapter, and what takes them then, in sentences."""
    said = []
    for group in ON_REQUEST:
        parts = [f.part for f in unasked if f.part.group == group]
        said += _ways(group, parts) if parts else []
    return " ".join(said)


def asked_with(found: Sequence[Decomposed]) -> str:
    """The options that it takes beside others to have all of these: " with --embeddings"."""
    groups = {f.part.group for f in found if f.part.fate == "unasked"}
    options = [OPTIONS[group] for group in ON_REQUEST if group in groups]
    return f" with {enumerated(options)}" if options else ""


def note_left_by_one_name(parts: Iterable[Counterpart]) -> list[Notice]:
    """A notice for an embedding that is the head too, and that goes with the other of its names."""
    return [
        Notice(
            "left-by-one-name",
            f"{part.name} and {part.twin} are one matrix, and {part.left_by} is left out by what "
            "was selected: so the other is not in the adapter either. Select both, or neither.",
            part.name,
        )
        for part in parts
        if part.left_by
    ]


def _ways(group: str, parts: Sequence[Counterpart]) -> list[str]:
    return [f"{OPTIONS[group]} {_SAVED[group]}."] if group in _SAVED else _of_lookups(parts)


def _of_lookups(parts: Sequence[Counterpart]) -> list[str]:
    """What becomes of these embeddings with `--embeddings`, in sentences."""
    shared = [part.name for part in parts if part.shared]
    factored = [part for part in parts if part.takes_factors and not part.shared]
    whole = [part.name for part in parts if not part.takes_factors and not part.shared]
    twins = [part.twin for part in parts if part.twin]
    said = []
    if twins:
        said.append(f"{twins[0]} is the same matrix, so its change is left out too.")
    if factored:
        refused = ", and llama.cpp refuses those of a head that is the embedding" if twins else ""
        said.append(
            f"{OPTIONS['embeddings']} gives {enumerated([part.module for part in factored], 2)} "
            f"factors; LoRAX, TGI and exllamav3 drop them without a word{refused}."
        )
    if whole:
        said.append(
            f"{OPTIONS['embeddings']} saves {enumerated(whole, 2)} whole; vLLM, SGLang and "
            "llama.cpp refuse adapters with that."
        )
    if shared:
        said.append(
            f"{shared[0]} is one matrix of encoder, decoder and head, for whose change an adapter "
            "has no place."
        )
    return said
