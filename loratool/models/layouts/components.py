"""Which part of a composite model an adapter belongs to: its text tower or its vision tower."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loratool.models.tasks import CLASS_ENDS, WRITING
from loratool.storage.tensors import TensorInfo

#: Words in the names of parts, classes and repositories, by what the part reads.
_KINDS = {
    "text": ("text", "language", "llm"),
    "vision": ("vision", "visual", "image", "vit", "pixel"),
    "audio": ("audio", "speech", "sound", "acoustic"),
    "prior": ("prior",),
    "query": ("qformer", "query"),
}
#: Tasks that are of text alone.
_OF_TEXT = WRITING | CLASS_ENDS.keys()


@dataclass(frozen=True)
class Wanted:
    """A tensor that an adapter changes, by its name in the adapter, and what it must be.

    `shape` is (out, in) of factors, whose weight may be stored either way, or with `whole` that of
    a tensor that is replaced, whose rows may be more or fewer.
    """

    name: str
    shape: tuple[int, ...]
    whole: bool = False

    def fits(self, info: TensorInfo) -> bool:
        if self.whole:
            return info.shape[1:] == self.shape[1:]
        stored = (info.shape[0], math.prod(info.shape[1:])) if info.shape else ()
        return sorted(stored) == sorted(self.shape)


class Hint(NamedTuple):
    """What a field of an adapter's config says about the model it was trained on."""

    field: str
    value: str


def contradicts(part: str, hints: Iterable[Hint]) -> Hint | None:
    """The hint that speaks of another kind of part than this; None if none does."""
    kind = _kind(part)
    said = ((hint, _kind_of(hint)) for hint in hints)
    return next((hint for hint, other in said if kind and other and other != kind), None)


def choose_part(parts: Sequence[str], hints: Iterable[Hint]) -> tuple[str | None, Hint]:
    """The only one of `parts` that a hint speaks of, and that hint; None if there is none.

    The hints are asked in their order; one that speaks of none or of several says nothing.
    """
    last = Hint("", "")
    for last in hints:
        kind = _kind_of(last)
        found = [part for part in parts if kind and _kind(part) == kind]
        if len(found) == 1:
            return found[0], last
    return None, last


def _kind_of(hint: Hint) -> str | None:
    if hint.field == "task_type":
        return "text" if hint.value in _OF_TEXT else None
    # Of a path or an id the last part counts: the names of organisations say nothing.
    return _kind(hint.value.rstrip("/").rpartition("/")[2])


def _kind(name: str) -> str | None:
    """What a part reads, by the words in its name; None if they say nothing, or two things."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    words = set(re.split(r"[^a-z]+", spaced))
    kinds = [kind for kind, known in _KINDS.items() if words & set(known)]
    return kinds[0] if len(kinds) == 1 else None


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a tensor lies in one of these parts of a model."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def parts_of(names: Iterable[str]) -> list[str]:
    """What of a model can be named as a part: the first components of its names."""
    return sorted({name.partition(".")[0] for name in names if "." in name})
