"""Where the parts of an adapter go in a base. Values only; `matching` finds them."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratool.adapters.adapter import Adapter, TokenRows
from loratool.adapters.experts import ExpertPair
from loratool.adapters.factors import Factors
from loratool.errors import AdapterError, nearest
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.layout import Layout, Naming
from loratool.models.layouts.parameter import Rows
from loratool.models.layouts.place import Place
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Delta:
    """Factors and the place in the base where they go: `W += weight·scale·Δ` there.

    `weight` is what the user gave the adapter; negative to take it out. Where a base cuts weights
    otherwise than the adapter, each place gets some `rows` of Δ.
    """

    place: Place
    factors: Factors
    weight: float = 1.0
    #: Rows of Δ that go there; all of them where it is None.
    rows: Rows | None = None

    @property
    def module(self) -> str:
        """What of the adapter it is of: the path of a layer, or the name of a stack."""
        pair = self.factors
        return pair.stack.weight_name if isinstance(pair, ExpertPair) else pair.path

    @property
    def tensor(self) -> str:
        return self.place.tensor

    @property
    def scale(self) -> float:
        """The factor of Δ. Raises AdapterError where the adapter has no alpha."""
        if self.factors.scale is None:
            raise AdapterError(
                f"{self.factors.path}: alpha is unknown, because the adapter does not tell.",
                "Say --alpha or --scale; alpha/r is in the training script (lora_alpha).",
            )
        return self.weight * self.factors.scale


@dataclass
class Match:
    """Where the parts of one adapter go, by name of the base tensor.

    `replaced` holds tensors that take the place of one in the base, `added` those it lacks.
    Those in `computed` are made of the base's own tensor by a function.
    `unmatched` says for each part that found no place why: `(what, reason)`.
    """

    adapter: Adapter
    naming: Naming
    deltas: list[Delta] = field(default_factory=list)
    biases: list[tuple[str, Factors]] = field(default_factory=list)
    rows: list[tuple[str, TokenRows]] = field(default_factory=list)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    added: dict[str, TensorInfo] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    unmatched: list[tuple[str, str]] = field(default_factory=list)


def outside_of(name: str, layout: Layout) -> str:
    return f"{name} is outside of what --components chose ({', '.join(layout.components)})"


def no_such(found: Match, name: str, base: Checkpoint) -> str:
    # The nearest name costs a comparison with every tensor of the base, and five are shown.
    near = nearest(name, base.tensors) if len(found.unmatched) < 5 else None
    return f"the base has no {name}" + (f" (nearest: {near})" if near else "")
