"""Where the weights of a base are, as seen from the names that adapters have for them.

An adapter's keys are module names of the library it was trained with; a base file has its own. A
name is looked up as it is, then by what it is in memory (`table`, `holding`). Here it is also known
which weights are stored `[in, out]`, and which output head shares the input embedding's matrix.
All of it is declared per architecture; a shape only tells parts of one model apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from loratool.errors import BaseError, unknown
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted, component_names, is_within
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.names import CONV1D, LANGUAGE_HEAD, ROOTS, SHARED
from loratool.models.layouts.overlap import Target
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.place import Place
from loratool.models.layouts.tying import find_tied, other_ties
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo

Naming = Callable[[str], str]


class Layout:
    """The names and orientations of one base, as seen from the adapters given to it."""

    def __init__(self, base: Checkpoint, components: Sequence[str] = ()) -> None:
        self.base = base
        #: The only parts of the base that an adapter may go into, by the beginnings of names.
        self.components = tuple(part.rstrip(".") for part in components)
        #: The parameters of the base by their names in memory.
        self.holdings = Holdings(base.tensors, base.config)
        #: What was decided.
        self.notices: list[Notice] = []
        for part in self.components:
            if not any(is_within(name, (part,)) for name in base.tensors):
                raise unknown("component", part, component_names(base.tensors))
        self.tied = find_tied(base, self.holdings)
        #: Names that no tensor has, and the tensors that they are: the tied head's and others'.
        self.aliases = other_ties(base, self.holdings, self.tied)
        if self.tied is not None and not self.tied.head_on_disk:
            self.aliases[self.tied.head] = self.tied.embedding
        self._targets: dict[tuple[str, tuple[int, int], int | None], list[Target] | str] = {}
        #: Where each architecture's modules are: models of several parts have a config for each.
        self._model_types = [("", base.model_type)] + [
            ("" if key.endswith("_config") else f"{key}.", value.get("model_type") or "")
            for key, value in base.config.items()
            if isinstance(value, dict)
        ]

    def admits(self, name: str) -> bool:
        """Whether a tensor may be changed: all may, or those of the chosen components."""
        return not self.components or is_within(name, self.components)

    def name_of(self, name: str) -> str | None:
        """The name in the base's files of the parameter that an adapter calls `name`; None where no
        tensor is that parameter and nothing else. A tied head has a name and no tensor."""
        if name in self.base.tensors or name in self.aliases:
            return name
        same = self.holdings.same(name)
        if same is not None:
            return same.name
        segments = self.holdings.names.segments
        own = segments(name)
        return next((alias for alias in self.aliases if segments(alias) == own), None)

    def tensor_of(self, name: str) -> TensorInfo | None:
        """The tensor of that parameter, which for a tied head is its embedding."""
        found = self.name_of(name)
        return None if found is None else self.base.tensors[self.aliases.get(found, found)]

    def targets(
        self, name: str, shape: tuple[int, int], experts: int | None = None
    ) -> list[Target]:
        """Where a delta goes that several tensors hold, or a part of one: see `Holdings.targets`.

        Raises MisfitError where it has no place.
        """
        key = name, shape, experts
        if key not in self._targets:
            try:
                self._targets[key] = self.holdings.targets(name, shape, experts)
            except MisfitError as error:
                self._targets[key] = str(error)
        found = self._targets[key]
        if isinstance(found, str):
            raise MisfitError(found)
        return found

    def fits(self, one: Wanted, name: str) -> bool:
        """Whether what an adapter changes has a place under this name."""
        info = self.tensor_of(name)
        if info is not None and (one.experts is None or len(info.shape) < 3):
            return one.fits(info)
        if one.whole:
            return name in self.holdings
        for shape in {one.matrix, one.matrix[::-1]} if one.experts is not None else {one.matrix}:
            try:
                return bool(self.targets(name, shape, one.experts))
            except MisfitError:
                continue
        return False

    def has(self, name: str) -> bool:
        """Whether the base holds this parameter, in one tensor, in parts, or as a part of one."""
        return self.name_of(name) is not None or all(
            segment.memory in self.holdings for segment in self.holdings.names.segments(name)
        )

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
    names = Holdings(model.tensors, model.config).names

    def rename(name: str) -> str:
        segments = names.segments(name)
        return segments[0].memory if len(segments) == 1 and segments[0].expert is None else name

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
