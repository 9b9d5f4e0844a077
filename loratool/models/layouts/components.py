"""Which part of a composite model an adapter belongs to: its text tower or its vision tower."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loratool.models.tasks import CLASS_ENDS, WRITING
from loratool.storage.tensors import TensorInfo

#: Words in the names of parts and classes, by what the part reads.
_KINDS = {
    "text": ("text", "language", "llm"),
    "vision": ("vision", "visual", "image", "vit", "pixel"),
    "audio": ("audio", "speech", "sound", "acoustic"),
    "prior": ("prior",),
    "query": ("qformer", "query"),
}
#: And by its place, where nothing says what it reads.
_PLACES = {word: (word,) for word in ("encoder", "decoder", "thinker", "talker")}
#: Words that say nothing of either.
_NEUTRAL = {"model", "encoder", "decoder", "tower", "transformer", "backbone", "module"}
#: Tasks that are of text alone.
_OF_TEXT = WRITING | CLASS_ENDS.keys()


@dataclass(frozen=True)
class Wanted:
    """A tensor that an adapter changes, by its name in the adapter, and what it must be.

    `shape` is (out, in) of factors, whose weight may be stored either way, or with `whole` that of
    a tensor that is replaced, whose rows may be more or fewer. With `experts` there are factors of
    this shape for each matrix of a stack. A side is 0 where the file does not tell it.
    """

    name: str
    shape: tuple[int, ...]
    whole: bool = False
    experts: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of factors."""
        out, width = self.shape
        return out, width

    def fits(self, info: TensorInfo) -> bool:
        if self.whole:
            return info.shape[1:] == self.shape[1:]
        stored = (info.shape[0], math.prod(info.shape[1:])) if info.shape else ()
        if 0 in self.shape:
            return max(self.shape) in (0, *stored)
        return sorted(stored) == sorted(self.shape)


class Hint(NamedTuple):
    """What a field of an adapter's config says about the model it was trained on."""

    field: str
    value: str


def contradicts(part: str, hints: Iterable[Hint]) -> Hint | None:
    """The first hint that speaks of a kind of part, if that is another than this one's."""
    kind = kind_of(part)
    hint = next((hint for hint in hints if _kind_of(hint)), None)
    return hint if kind and hint and _kind_of(hint) != kind else None


def choose_part(parts: Sequence[str], hints: Iterable[Hint]) -> tuple[str | None, Hint]:
    """The only one of `parts` that a hint speaks of, and that hint; None if there is none.

    The hints are asked in their order; one that speaks of none or of several says nothing.
    """
    last = Hint("", "")
    for last in hints:
        kind = _kind_of(last)
        found = [part for part in parts if kind and kind_of(part) == kind]
        if len(found) == 1:
            return found[0], last
    return None, last


def _kind_of(hint: Hint) -> str | None:
    if hint.field == "task_type":
        return "text" if hint.value in _OF_TEXT else None
    if hint.field == "base_model_name_or_path":
        # The last folder of a path may be a part (text_encoder); the name of a repository is that
        # of a whole model, whatever words it has: clip-vit-base, Llama-3.2-11B-Vision.
        last = hint.value.rstrip("/").rpartition("/")[2]
        whole = _words(last) - _NEUTRAL - {word for known in _KINDS.values() for word in known}
        return None if whole else kind_of(last)
    return kind_of(hint.value)


def _words(name: str) -> set[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    return set(re.split(r"[^a-z]+", spaced)) - {""}


def kind_of(name: str) -> str | None:
    """What a part reads, or else where it stands, by the words in its name; None if they say
    nothing, or two things."""
    words = _words(name)
    for table in (_KINDS, _PLACES):
        kinds = [kind for kind, known in table.items() if words & set(known)]
        if kinds:
            return kinds[0] if len(kinds) == 1 else None
    return None


def may_be(one: str, other: str, whole: str | None) -> bool:
    """Whether the part of a model that names begin with in one place, `one`, can be the part that
    they begin with in another, `other`, in a model of the kind `whole`.

    Only beginnings that say nothing but what a part reads are known well enough for that; one that
    says nothing at all (`model.`) is of text.
    """
    kinds = []
    for path in (one, other):
        parts = [part for part in path.split(".") if part]
        if any(not (_words(part) <= _NEUTRAL or kind_of(part) in _KINDS) for part in parts):
            return False
        kinds.append(next((kind for part in parts if (kind := kind_of(part)) in _KINDS), None))
    return (kinds[1] or whole) in (None, kinds[0] or "text")


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a tensor lies in one of these parts of a model."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def component_names(names: Iterable[str]) -> list[str]:
    """What of a model can be named as a part: the beginnings of its names, two words at most."""
    found = set()
    for name in names:
        first, second, *rest = [*name.split("."), "", ""]
        if second:
            found.add(first)
        if any(rest) and not second.isdecimal():
            found.add(f"{first}.{second}")
    return sorted(found)
