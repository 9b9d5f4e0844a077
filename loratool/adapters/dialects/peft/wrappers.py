"""Which bare parameter a pair of factors in a PEFT file adapts.

PEFT wraps a module once for each of its parameters that is targeted, and a key names the wrapper,
not the parameter: the parameter that the module registered first is innermost, and has the most
`base_layer` in its key. So the names come from the config, and their order from what models are
known to register; shapes have the last word. Sources: peft/tuners/tuners_utils.py
(`_inject_parameters`), peft/tuners/lora/layer.py (`ParamWrapper`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from loratool.adapters.dialects.peft.automaton import Automaton, Effort, PatternError
from loratool.adapters.told import Packing
from loratool.errors import AdapterError
from loratool.paths import dotted_ends
from loratool.storage.fields import value_text
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.storage.tensors import TensorInfo
from loratool.words import enumerated

_INNER = ".base_layer"

#: The order in which the models of transformers register the parameters of a module.
_REGISTERED = [
    ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias"),
    ("w1", "v1", "w2"),
]

_KNOWN = {name for names in _REGISTERED for name in names}

#: More names than any module has parameters.
_MOST_NAMES = 64

#: What is said of a module whose parameters nobody can tell.
_UNNAMED = "target_parameters of the config names none of its parameters"


class WrappedPair(NamedTuple):
    """lora_A and lora_B of one wrapper."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class Parameter:
    """A bare parameter of a module."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """What the patterns of a config are held against, and what the tensor is called."""
        return f"{self.module}.{self.name}"


class Wrappers:
    """What the pairs of a file adapt: by their paths as the keys have them.

    `parameters` has those that adapt a bare parameter, `unclear` those that do and nobody can tell
    which, with the reason. All others are layers.
    """

    def __init__(self, config: dict[str, Any], pairs: Mapping[str, WrappedPair]) -> None:
        self.parameters: dict[str, Parameter] = {}
        self.unclear: dict[str, str] = {}
        #: Names of parameters by the end of their module's path; "" is any module.
        self._names: dict[str, list[str]] = defaultdict(list)
        for entry in dict.fromkeys(config.get("target_parameters") or []):
            module, _, name = entry.rpartition(".")
            self._names[module].append(name)
        chosen: str | list[str] = config.get("target_modules") or []
        self._layers = set(chosen if isinstance(chosen, list) else ())
        self._pattern = "" if isinstance(chosen, list) else chosen
        nests: dict[str, list[str]] = defaultdict(list)
        for path in pairs:
            root = path
            while root.endswith(_INNER):
                root = root.removesuffix(_INNER)
            nests[root].append(path)
        for root, paths in nests.items():
            self._resolve(root, sorted(paths, key=len, reverse=True), pairs)

    def _resolve(self, root: str, paths: Sequence[str], pairs: Mapping[str, WrappedPair]) -> None:
        """`paths` are the keys of one module's wrappers, the innermost first."""
        named = self._named(root, len(paths))
        plain = len(paths) == 1 and paths[0] == root
        module, _, leaf = root.rpartition(".")
        if plain and leaf in _KNOWN and _is_stack(*pairs[root]):
            # Programs that write a parameter as if it was a module, with an axis for the experts.
            self.parameters[root] = Parameter(module, leaf)
            return
        if plain and not named and leaf != "experts":
            return
        if len(paths[0]) != len(root) + len(_INNER) * (len(paths) - 1):
            reason = "a wrapper between the outermost and the innermost one is not in the file"
        else:
            nested = [pairs[path] for path in paths]
            names, reason = self._ordered(named, nested)
            self.parameters |= {
                path: Parameter(root, name) for path, name in zip(paths, names, strict=False)
            }
        if reason:
            self.unclear |= dict.fromkeys(paths, reason)

    def _named(self, root: str, count: int) -> list[str]:
        """The names of parameters of a module that the config means, each once, if `count` of them
        are in the file."""
        if not self._names:
            return []  # of nearly every adapter
        ends = (name for end in dotted_ends(root) for name in self._names.get(end, ()))
        found = list(islice(ends, _MOST_NAMES))
        # A name without a module means that parameter of any module, but not of a layer.
        if "" in self._names and len(found) < count and not self._is_layer(root):
            found += self._names[""][:_MOST_NAMES]
        return list(dict.fromkeys(found))

    def _is_layer(self, path: str) -> bool:
        """Whether target_modules means this module, so that it is a layer."""
        if not self._pattern:
            return any(end in self._layers for end in dotted_ends(path))
        if self._pattern.lower() == "all-linear":
            return path.rpartition(".")[2] != "experts"
        try:
            return self._automaton.matches(path)
        except (PatternError, RecursionError) as error:
            raise AdapterError(
                f"{ADAPTER_CONFIG}: target_modules is {value_text(self._pattern)}, which cannot be "
                f"used as a regular expression: {error}.",
                "PEFT reads a text there as one; write a list of names instead.",
            ) from None

    @cached_property
    def _automaton(self) -> Automaton:
        return Automaton(f"({self._pattern})$", Effort())

    def _ordered(
        self, named: Collection[str], nested: Sequence[WrappedPair]
    ) -> tuple[list[str], str]:
        """The parameters of nested wrappers, the innermost first; or [] and why nobody can tell."""
        shown = enumerated(list(named))
        if not named:
            names = _by_shape(nested) if len(nested) == 2 else []
            return names, "" if names else _UNNAMED
        if len(named) != len(nested):
            return [], f"target_parameters names {shown}, but the file has {len(nested)} of them"
        if len(named) == 1:
            return list(named), ""
        order = registered(named)
        if order is None:
            return [], f"no model is known that has {shown}, so which is the inner one is unknown"
        names = sorted(named, key=order.index)
        found = _by_shape(nested) if len(nested) == 2 else []
        # A model that registers them the other way round; the shapes never fit both ways.
        return found if set(found) == set(names) else names, ""


def registered(names: Collection[str]) -> tuple[str, ...] | None:
    """The parameters of the module that has these, in its order; None where none is known. One
    alone has no order."""
    if len(names) == 1:
        return tuple(names)
    return next((known for known in _REGISTERED if set(names) <= set(known)), None)


def _is_stack(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether both factors have an axis for the experts."""
    return len(a.shape) == len(b.shape) == 3 and bool(packings(a.shape, b.shape))


def packings(a: Sequence[int], b: Sequence[int]) -> list[Packing]:
    """How a B of three axes can hold the experts of `A [E, r, in]`."""
    experts, rank, _ = a
    fits: list[Packing] = []
    if (b[1], b[2]) == (rank, experts):
        fits.append("rank-major")
    if (b[0], b[2]) == (experts, rank):
        fits.append("stacked")
    return fits


def _by_shape(nested: Sequence[WrappedPair]) -> list[str]:
    """What the shapes of two wrappers say: names, the innermost first, or [].

    gate_up goes from H to 2·I and down from I to H, or both the other way round if swapped. With
    up alone in its place, whose factor is 1, the two cannot be told apart, only that they are it.
    """
    (a, b), (u, v) = [(pair.a.shape[-1:], pair.b.shape[:1]) for pair in nested]
    if not (a and b and u and v):
        return []
    inner, outer = (a[0], b[0]), (u[0], v[0])
    if _goes_up(inner, outer, 2):
        return ["gate_up_proj", "down_proj"]
    if _goes_up(outer, inner, 2):
        return ["down_proj", "gate_up_proj"]
    return ["up_proj", "down_proj"] if inner == outer[::-1] and inner[0] != inner[1] else []


def _goes_up(up: tuple[int, int], down: tuple[int, int], times: int) -> bool:
    """Whether `(in, out)` of two factors are those of (gate and) up and of down."""
    straight = up[0] == down[1] and up[1] == times * down[0]
    swapped = up[1] == down[0] and up[0] == times * down[1]
    return straight or swapped
