"""One tensor of a fine-tune and the base's, with how an adapter can hold its change."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratool.adapters.factors import Kind, ModuleShape
from loratool.extracting.kinds import FACTORED, Group
from loratool.extracting.selection import Fate
from loratool.models.layouts.names import is_vocabulary
from loratool.models.layouts.place import Place
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Stack:
    """A parameter with a matrix for each of `experts`, which have factors of their own.

    PEFT adapts it by its name (target_parameters), with one rank for all of them. `whole` is the
    tuned one. `order` is its number among the parameters of its module, as the module registered
    them.
    """

    parameter: str
    experts: int
    whole: TensorInfo
    order: int = 0


@dataclass(frozen=True)
class Counterpart:
    """One tensor of the tuned model, `name` as a model in memory has it, and the base's.

    Of a stack it is one matrix, whose name ends in the expert's number. `place` is where its
    factors go, with the name in memory that the base has for it. `base` is None for a tensor that
    only the tuned model has. `fate` is what becomes of it if it has changed. `twin` is the head
    that is the same matrix in both models, for an embedding that has one, and `left_by` the one of
    the two names for which alone the user does not want it. A head is `untied` that is the
    embedding in the base alone. `shared` is set for the matrix that encoder, decoder and head have
    together, for which no adapter has a place.
    """

    name: str
    place: Place
    base: TensorInfo | None
    tuned: TensorInfo
    group: Group
    fate: Fate
    twin: str = ""
    left_by: str = ""
    untied: bool = False
    shared: bool = False
    stack: Stack | None = None

    @property
    def module(self) -> str:
        return self.unit.rpartition(".")[0]

    @property
    def unit(self) -> str:
        """What has one rank: the tensor, or the stack that it is of."""
        return self.stack.parameter if self.stack else self.name

    @property
    def nbytes(self) -> int:
        """What is read to compare the two."""
        return self.tuned.nbytes + (self.base.nbytes if self.base is not None else 0)

    @property
    def is_comparable(self) -> bool:
        """Whether there is a difference: both sides there, of one shape."""
        return self.base is not None and self.base.shape == self.tuned.shape

    @property
    def takes_factors(self) -> bool:
        """Whether factors can hold its change, wanted or not.

        Embeddings of positions are none: they do not look up what they are given.
        """
        lookup = self.group == "embeddings" and not is_vocabulary(f"{self.module}.weight")
        numbers = self.base is not None and self.base.is_float and self.tuned.is_float
        return self.is_comparable and numbers and self.group in FACTORED and not lookup

    @property
    def outline(self) -> ModuleShape:
        """Its own factors. An embedding's product is `(B·A)ᵀ`, and so is a Conv1D's."""
        rows, *inner = self.tuned.shape
        kind: Kind = {"embeddings": "embedding", "convs": "conv"}.get(self.group, "linear")  # type: ignore[assignment]
        path = self.name if self.stack else self.module
        if self.place.transposed:
            return ModuleShape(path, kind, inner[0], (rows,))
        return ModuleShape(path, kind, rows, tuple(inner))

    @property
    def outlines(self) -> list[ModuleShape]:
        """Its own factors; the twin's are the same two, transposed."""
        own = self.outline
        if not self.twin:
            return [own]
        return [own, ModuleShape(self.twin.rpartition(".")[0], "linear", own.inner[0], (own.out,))]

    def filed(self, above: int = 0) -> list[ModuleShape]:
        """What of the file it is in: of a stack all matrices together, inside of `above` others."""
        if not self.stack:
            return self.outlines
        own = self.outline
        return [ModuleShape(self.unit, "experts", own.out, own.inner, self.stack.experts, above)]

    @property
    def names(self) -> list[str]:
        return [self.name, *([self.twin] if self.twin else [])]


@dataclass
class Counterparts:
    """All tensors of a fine-tune. `stacks` are the names of all parameters that are such, changed
    or not. Names of the base begin with `beginnings[0]` where the tuned model's have the other."""

    found: list[Counterpart] = field(default_factory=list)
    fan_in_fan_out: bool = False
    stacks: set[str] = field(default_factory=set)
    beginnings: tuple[str, str] = ("", "")
    notices: list[Notice] = field(default_factory=list)

    def in_tuned(self, name: str) -> str:
        """What the tuned model calls a tensor of the base."""
        base, tuned = self.beginnings
        return tuned + name.removeprefix(base) if name.startswith(base) else name

    @property
    def modules(self) -> set[str]:
        twins = {c.twin.rpartition(".")[0] for c in self.found if c.twin}
        return twins | {c.module for c in self.found}
