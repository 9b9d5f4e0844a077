"""How architectures name and lay out their weights.

An adapter's keys are module names of the transformers version it was trained with; a base file has
its own names. This module finds for each name of the one the tensor of the other. It knows which
weights are stored `[in, out]`, and which output head shares the input embedding's matrix. All of it
is declared per architecture; a shape only tells parts of one model apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from loratool.errors import BaseError, MatchError, unknown
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import (
    Hint,
    Wanted,
    choose_part,
    contradicts,
    is_within,
    kind_of,
    parts_of,
)
from loratool.models.layouts.names import (
    CONV1D,
    IN_MEMORY,
    LANGUAGE_HEAD,
    ON_DISK,
    PLAIN_PAIRS,
    RENAMED,
    ROOTS,
    SHARED,
)
from loratool.models.layouts.place import Place
from loratool.models.layouts.tying import find_tied
from loratool.notices import Notice
from loratool.words import enumerated

Naming = Callable[[str], str]

#: Prefixes that are tried; models have fewer parts.
_PREFIXES = 12


class Layout:
    """The names and orientations of one base, as seen from the adapters given to it."""

    def __init__(self, base: Checkpoint, components: Sequence[str] = ()) -> None:
        self.base = base
        #: The only parts of the base that an adapter may go into, by the beginnings of names.
        self.components = tuple(part.rstrip(".") for part in components)
        #: What was decided.
        self.notices: list[Notice] = []
        for part in self.components:
            if not any(is_within(name, (part,)) for name in base.tensors):
                raise unknown("component", part, parts_of(base.tensors))
        self.tied = find_tied(base)
        #: Where each architecture's modules are: models of several parts have a config for each.
        self._model_types = [("", base.model_type)] + [
            ("" if key.endswith("_config") else f"{key}.", value.get("model_type") or "")
            for key, value in base.config.items()
            if isinstance(value, dict)
        ]

    def choose_naming(self, wanted: Sequence[Wanted], hints: Sequence[Hint] = ()) -> Naming:
        """The renaming from adapter names to base names that places the most of `wanted`.

        Candidates, in this order: as they are; the architecture's renames; each of these with a
        leading component taken off, or with a prefix put before. The one that places most with
        fitting shapes wins, and among equals the first. Where several prefixes do equally well
        `hints` decide, and MatchError is raised if they do not.
        """
        best: Naming = _identity
        most = (-1, -1)
        for naming in self._namings(wanted):
            score = self._score(naming, wanted)
            if score > most:
                best, most = naming, score
            if score == (len(wanted), len(wanted)):
                return self._instead(wanted, hints) or best
        rooted: dict[str, Naming] = {}
        for prefix, naming in self._prefixed(wanted):
            score = self._score(naming, wanted)
            if score > most:
                best, most, rooted = naming, score, {prefix: naming}
            elif score == most and rooted:
                rooted.setdefault(prefix, naming)
        if len(rooted) > 1 and 2 * most[0] >= len(wanted):  # less is another model's adapter
            return rooted[self._chosen(list(rooted), hints)]
        for prefix in rooted:
            self._note_doubt(prefix.rstrip("."), hints)
        return best

    def _instead(self, wanted: Sequence[Wanted], hints: Sequence[Hint]) -> Naming | None:
        """The part that takes everything too and that the class in the config names, where the
        names fit as they are: beside towers with a root one may have none."""
        classes = [hint for hint in hints if hint.field == "base_model_class"]
        whole = {
            prefix.rstrip("."): naming
            for prefix, naming in (self._prefixed(wanted) if classes else ())
            if self._score(naming, wanted) == (len(wanted), len(wanted))
        }
        part, hint = choose_part(list(whole), classes)
        if part is None:
            return None
        text = (
            f"The names fit as they are and in {part}; {hint.field} of its config, {hint.value}, "
            f"is for {part}."
        )
        self.notices.append(Notice("component", text, self.base.label))
        return whole[part]

    def _note_doubt(self, part: str, hints: Sequence[Hint]) -> None:
        hint = None if self.components else contradicts(part, hints)
        if hint is not None:
            text = (
                f"The adapter went into {part}, the only part of the base that takes it, though "
                f"{hint.field} of its config, {hint.value}, speaks of another part."
            )
            self.notices.append(Notice("component", text, self.base.label))

    def _chosen(self, prefixes: list[str], hints: Sequence[Hint]) -> str:
        """One of the parts of the base that take the whole adapter, by what its config says."""
        parts = [prefix.rstrip(".") for prefix in prefixes]
        chosen, hint = choose_part(parts, hints)
        if chosen is None:
            raise MatchError(
                f"{self.base.label}: {enumerated(parts)} would each take the whole adapter, and "
                "its config does not say for which part of the model it was trained.",
                f"Choose with --components, for instance --components {parts[0]}.",
            )
        text = (
            f"{enumerated(parts)} would each take the whole adapter; {hint.field} of its config, "
            f"{hint.value}, is for {chosen}."
        )
        self.notices.append(Notice("component", text, self.base.label))
        return f"{chosen}."

    def _score(self, naming: Naming, wanted: Sequence[Wanted]) -> tuple[int, int]:
        """How many of `wanted` find a tensor that fits, and how many find one at all."""
        fitting = there = 0
        for one in wanted:
            name = naming(one.name)
            if not self.admits(name):
                continue
            if self.has(name):
                there += 1
                info = self.base.tensors.get(name)
                if info is None and self.tied is not None:
                    info = self.base.tensors[self.tied.embedding]
                fitting += info is not None and one.fits(info)
        return fitting, there

    def admits(self, name: str) -> bool:
        """Whether a tensor may be changed: all may, or those of the chosen components."""
        return not self.components or is_within(name, self.components)

    def has(self, name: str) -> bool:
        """True if the base holds `name`, or ties it to a tensor it holds."""
        return name in self.base.tensors or (self.tied is not None and name == self.tied.head)

    @property
    def _renames(self) -> list[Naming]:
        keys = [key for key in (self.base.model_type, "") if key in ON_DISK]
        return [_identity, *(_substitute(ON_DISK[key]) for key in keys)]

    def _namings(self, wanted: Sequence[Wanted]) -> Iterator[Naming]:
        heads = {one.name.partition(".")[0] for one in wanted}
        roots = {name.partition(".")[0] for name in self.base.tensors}
        yield from self._renames
        own = kind_of(self.base.model_type)
        for root in sorted(heads - roots):
            if own and kind_of(root) not in (None, own):
                continue  # a text tower's adapter is none for a vision tower without a root
            for rename in self._renames:
                yield _strip(root + ".", rename)

    def _prefixed(self, wanted: Sequence[Wanted]) -> Iterator[tuple[str, Naming]]:
        """The prefixes that make names of the base out of the most of `wanted`."""
        for rename in self._renames:
            renamed = {rename(one.name) for one in wanted}
            counts = Counter(
                name[: -len(end)]
                for name in self.base.tensors
                for end in _ends(name)
                if end in renamed
            )
            for prefix, _ in counts.most_common(_PREFIXES):
                yield prefix, _add(prefix, rename)

    def place(self, tensor: str, kind: str, fan_in_fan_out: bool, shape: tuple[int, int]) -> Place:
        """Where a delta of this `(out, in)` goes: `tensor`, in the orientation it is stored in.

        Embeddings are stored as the transpose of B·A, which is `[dim, tokens]`.
        """
        transposed = kind == "embedding" or (
            kind == "linear"
            and self.is_transposed(tensor.rpartition(".")[0], fan_in_fan_out, shape[0] == shape[1])
        )
        return Place(tensor, transposed=transposed)

    def is_transposed(self, path: str, fan_in_fan_out: bool, square: bool) -> bool:
        """Whether the weight of the linear module at `path` is stored `[in, out]`.

        Where the base has no config.json to name its architecture, PEFT's `fan_in_fan_out` is asked
        (it is unreliable for single modules, but only wrong where shapes would show it), unless
        the matrix is square: then nothing could ever show the mistake, so BaseError is raised.
        """
        if self.base.model_type:
            return any(
                path.startswith(prefix) and re.search(CONV1D[kind], path)
                for prefix, kind in self._model_types
                if kind in CONV1D
            )
        if fan_in_fan_out and square:
            raise BaseError(
                f"{self.base.label}: {path} is square and the adapter says fan_in_fan_out, but "
                "without config.json it cannot be decided whether the weight is stored [in, out].",
                "Put the base's config.json (with its model_type) beside the weights.",
            )
        return fan_in_fan_out

    def shared_alias(self, name: str) -> bool:
        """True for names of the matrix that encoder-decoder models share between three places."""
        if name in self.base.tensors and self.base.config.get("tie_word_embeddings") is False:
            return name.endswith("shared.weight")
        has_shared = any(n in self.base.tensors for n in ("shared.weight", "model.shared.weight"))
        return has_shared and SHARED.search(name) is not None


def in_memory(model: Checkpoint) -> Naming:
    """From names on disk to those of the class in config.json, as transformers 5 and PEFT see it.

    Some models were saved without their head, and so without the name under which the class with
    the head holds them.
    """
    rename = _substitute([*IN_MEMORY.get(model.model_type, []), *IN_MEMORY[""]])
    root = ROOTS.get(model.model_type, "")
    architectures = model.config.get("architectures") or []
    headless = not architectures or any(name.endswith("Model") and "LMHead" not in name
                                        for name in architectures)  # fmt: skip
    if not root or headless or any(name.startswith(f"{root}.") for name in model.tensors):
        return rename

    def rooted(name: str) -> str:
        inside = LANGUAGE_HEAD.search(name) is None and not name.startswith(f"{root}.")
        return f"{root}.{rename(name)}" if inside else rename(name)

    return rooted


def has_unknown_names(model: Checkpoint) -> bool:
    """Whether transformers 5 may hold the modules of this model under names not known here."""
    config = model.config
    mixed = "vision_config" in config and ("text_config" in config or "llm_config" in config)
    return model.model_type in RENAMED or (mixed and model.model_type not in PLAIN_PAIRS)


def _identity(name: str) -> str:
    return name


def _ends(name: str) -> Iterator[str]:
    """The dotted ends of a name, without itself: "b.c" and "c" of "a.b.c"."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _substitute(rules: list[tuple[str, str]]) -> Naming:
    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name

    return rename


def _strip(prefix: str, then: Naming) -> Naming:
    return lambda name: then(name.removeprefix(prefix))


def _add(prefix: str, then: Naming) -> Naming:
    return lambda name: then(prefix + name)
