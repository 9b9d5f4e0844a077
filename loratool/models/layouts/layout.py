"""How architectures name and lay out their weights.

An adapter's keys are module names of the transformers version it was trained with; a base file has
its own names. This module finds for each name of the one the tensor of the other. It knows which
weights are stored `[in, out]`, and which output head shares the input embedding's matrix. All of it
is declared per architecture; nothing is read off a shape.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import (
    CONV1D,
    IN_MEMORY,
    LANGUAGE_HEAD,
    LEGACY_BUFFER,
    ON_DISK,
    PLAIN_PAIRS,
    RENAMED,
    ROOTS,
    SHARED,
)
from loratool.models.layouts.place import Place
from loratool.models.layouts.tying import find_tied

Naming = Callable[[str], str]


def is_legacy_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """True for causal masks and frequency tables that were saved although they are constants.

    `attn.bias` is one only with the mask's shape `[1, 1, n, n]`; elsewhere it is a real bias.
    """
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(shape) == 4 and shape[:2] == (1, 1)
    return LEGACY_BUFFER.search(name) is not None


class Layout:
    """The names and orientations of one base, as seen from the adapters given to it."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.tied = find_tied(base)
        #: Where each architecture's modules are: models of several parts have a config for each.
        self._model_types = [("", base.model_type)] + [
            ("" if key.endswith("_config") else f"{key}.", str(value.get("model_type")))
            for key, value in base.config.items()
            if isinstance(value, dict)
        ]

    def choose_naming(self, names: Iterable[str]) -> Naming:
        """The renaming from adapter names to base names that places the most of `names`.

        Candidates, in this order: as they are; the architecture's renames; each of these with a
        leading component taken off or put before. The first that places all of them wins, else the
        one that places most.
        """
        wanted = list(names)
        best: Naming = _identity
        most = -1
        for naming in self._candidates(wanted):
            placed = sum(self.has(naming(name)) for name in wanted)
            if placed > most:
                best, most = naming, placed
            if placed == len(wanted):
                break
        return best

    def has(self, name: str) -> bool:
        """True if the base holds `name`, or ties it to a tensor it holds."""
        return name in self.base.tensors or (self.tied is not None and name == self.tied.head)

    def _candidates(self, names: list[str]) -> Iterable[Naming]:
        renames: list[Naming] = [_identity]
        for key in (self.base.model_type, ""):
            if key in ON_DISK:
                renames.append(_substitute(ON_DISK[key]))
        heads = {name.partition(".")[0] for name in names}
        roots = Counter(name.partition(".")[0] for name in self.base.tensors)
        yield from renames
        for root in sorted(heads - roots.keys()):
            for rename in renames:
                yield _strip(root + ".", rename)
        for root, _count in roots.most_common(3):
            for rename in renames:
                yield _add(root + ".", rename)

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
    architectures = [str(name) for name in model.config.get("architectures") or []]
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
