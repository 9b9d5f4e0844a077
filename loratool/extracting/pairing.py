"""Which tensors of a base and of its fine-tune belong together, and how an adapter can hold each.

Decided from headers alone, by these rules:

- 2-D weights and convolutions become factors.
- Routers, classifiers, bare parameters and everything else are saved whole; so is a vocabulary
  that grew or shrank, and a head of another shape or a new one.
- Embeddings are on request: of tokens as factors, all others whole. A head that is the embedding
  of tokens goes the same way.
- Norms and biases are saved whole on request; those of a module that is saved, with it.
- What the two do not share otherwise is refused: they are not of one architecture.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratool.adapters.dialects import WRITTEN
from loratool.errors import MatchError, listed
from loratool.extracting.counterparts import Counterpart, Counterparts, Stack
from loratool.extracting.kinds import group_of
from loratool.extracting.parameters import ModelParameter, parameters_of, renamed
from loratool.extracting.selection import Fate, Selection
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.layout import Layout, in_memory
from loratool.models.layouts.names import HEAD, PRETRAINING, is_vocabulary
from loratool.models.layouts.naming import choose_naming
from loratool.notices import Notice
from loratool.paths import numbers_of, pattern

#: The file name of one shard of several.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def pair(base: Checkpoint, tuned: Checkpoint, choice: Selection) -> Counterparts:
    """Find the counterpart of every tensor.

    Raises MatchError where the two are no base and fine-tune of one architecture.
    """
    kinds = (base.model_type, tuned.model_type)
    if all(kinds) and kinds[0] != kinds[1]:
        raise MatchError(
            f"Different architectures: {base.label} is a {kinds[0]}, {tuned.label} a {kinds[1]}.",
            "Give a base and a model that was fine-tuned from it.",
        )
    return _Pairing(base, tuned, choice).result()


class _Pairing:
    """The parameters of both models, by their names in memory, and what is found of them."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, choice: Selection) -> None:
        self.base, self.tuned, self.choice = base, tuned, choice
        self.layout, self.own = Layout(base), Layout(tuned)
        self.tied = _tied_names(self.layout)
        certain = self.own.tied is not None and self.own.tied.certain
        self.own_tied = _tied_names(self.own) if certain else None
        self.before = _all_parameters(self.layout, self.tied)
        self.after = _all_parameters(self.own, self.own_tied)
        self.found = Counterparts()
        self.lost: list[str] = []
        self.misfits: list[str] = []

    def result(self) -> Counterparts:
        wanted = [Wanted(name, p.info.shape, whole=True) for name, p in self.after.items()]
        naming = choose_naming(self.layout, wanted)
        named = in_memory(self.tuned)
        found, taken = self.found, set()
        tied, own_tied = self.tied, self.own_tied
        for name, parameter in self.after.items():
            base_name = self._in_base(naming(name))
            source = self.before.get(base_name)
            taken.add(base_name)
            if name != base_name and source is not None:
                found.beginnings = _beginnings(base_name, name)
            if tied and own_tied and name == own_tied.head:
                continue  # the embedding stands for it
            path = named(max(name, base_name, key=len))
            parts = self._counterparts(path, base_name, source, parameter)
            if tied and own_tied and name == own_tied.embedding:
                twin = named(own_tied.head)
                parts = [self._of_both(part, twin) for part in parts]
            elif tied and not own_tied and base_name == tied.head:
                parts = [replace(part, untied=True) for part in parts]
            self._check(parts[0], name, base_name, source, parameter)
            found.found += parts
            if parameter.members:
                found.stacks.add(path)
        self.lost += self._missing(taken, tied.head if tied else "")
        _refuse(self.base, self.tuned, self.lost, self.misfits)
        _check_names(found, self.tuned)
        found.found = _by_layer(_ordered(found.found, self.own.holdings.names.entry.parameters))
        found.fan_in_fan_out = any(
            c.place.transposed and c.group == "linears" and not c.stack for c in found.found
        )
        self.choice.check({
            *found.modules, *found.stacks, *(name.rpartition(".")[0] for name in self.before),
        })  # fmt: skip
        return found

    def _in_base(self, name: str) -> str:
        """A name in memory of what naming calls `name`, which may be a name in the files."""
        if name in self.before:
            return name
        segments = self.layout.holdings.names.segments(name)
        return segments[0].memory if len(segments) == 1 else name

    def _counterparts(
        self, path: str, base_name: str, source: ModelParameter | None, parameter: ModelParameter
    ) -> list[Counterpart]:
        """The counterparts of one parameter: one, or one for each matrix of a stack."""
        whole = self._counterpart(path, base_name, source, parameter)
        both = source is not None and source.members and parameter.members
        if whole.fate != "factors" or source is None or not both:
            return [whole]
        stack = Stack(path, len(parameter.members), parameter.info)
        return [
            replace(whole, name=f"{path}.{number}", base=before, tuned=after, stack=stack)
            for number, (before, after) in enumerate(
                zip(source.members, parameter.members, strict=True)
            )
        ]

    def _counterpart(
        self, path: str, base_name: str, source: ModelParameter | None, parameter: ModelParameter
    ) -> Counterpart:
        info = parameter.info
        group = group_of(path, parameter, self.after, self.tuned.model_type)
        module = path if parameter.members else path.rpartition(".")[0]
        fate = self.choice.fate(module, group)
        kind = {"embeddings": "embedding", "linears": "linear"}.get(group, "")
        shape = info.shape[0] if info.shape else 1, math.prod(info.shape[1:])
        place = replace(self.own.place(parameter.name, kind, False, shape), tensor=base_name)
        if parameter.members:
            flipped = self.own.holdings.names.entry.transposed_experts
            place = replace(place, transposed=flipped)
        found = Counterpart(
            path, place, source.info if source else None, info, group, fate,
            shared=self.layout.shared_alias(base_name) or self._has_alias(parameter.name),
        )  # fmt: skip
        # What the base has in another shape, or not at all, is no change that could be left out
        # because nobody asked for it: the model is another one without it.
        other = fate == "unasked" and not found.is_comparable
        no_factors = fate == "factors" and not found.takes_factors
        return replace(found, fate="whole") if other or no_factors else found

    def _of_both(self, part: Counterpart, twin: str) -> Counterpart:
        """An embedding that is the head `twin` too: it is left out, or saved whole, if either of
        the two names is to be."""
        other = self.choice.fate(twin.rpartition(".")[0], "embeddings")
        decided: tuple[Fate, ...] = ("left", "whole")
        fate = next((one for one in decided if one in (part.fate, other)), part.fate)
        by = twin if other == "left" else part.name
        alone = fate == "left" and part.fate != other
        return replace(part, twin=twin, fate=fate, left_by=by if alone else "")

    def _has_alias(self, name: str) -> bool:
        """Whether the model has a matrix in two places that are no embedding and head of it all."""
        entry = self.own.holdings.names.entry
        return any(
            of == name and alias != f"{entry.head}.weight" and alias not in self.after
            for alias, of in entry.tied
            if alias.endswith(".weight")
        )

    def _check(
        self, found: Counterpart, name: str, base_name: str, source: ModelParameter | None,
        parameter: ModelParameter,
    ) -> None:  # fmt: skip
        """Note why the two cannot be compared, if they have to be."""
        if found.fate == "left":
            return
        for side, one in ((self.base, source), (self.tuned, parameter)):
            if one is not None and one.trouble:
                self.misfits.append(f"{name}: in {side.label} {one.trouble}")
                return
        shape = list(parameter.info.shape)
        if source is None:
            if not self._is_new_head(base_name):
                self.lost.append(f"{name} {shape}: only in the tuned model")
        elif source.info.shape != parameter.info.shape and not _resizable(name, source, parameter):
            self.misfits.append(f"{name}: base {list(source.info.shape)}, tuned {shape}")

    def _is_new_head(self, name: str) -> bool:
        """Whether a tensor that the base lacks belongs to a head that it lacks.

        Known heads, and modules at the top of the model that are no stack of layers.
        """
        module = name.rpartition(".")[0]
        if not module or any(t.startswith(f"{module}.") for t in self.before):
            return False
        top = module.partition(".")[0]
        layered = bool(numbers_of(module))
        new = not any(t.partition(".")[0] == top for t in self.before)
        return HEAD.search(module) is not None or (new and not layered)

    def _missing(self, taken: set[str], tied_head: str) -> list[str]:
        """What only the base has. Heads that the tuned model's class has no use for are no loss."""
        lost, dropped, left = [], [], []
        before, after = (c.config.get("architectures") or [] for c in (self.base, self.tuned))
        for name, parameter in self.before.items():
            if name in taken or name == tied_head:
                continue
            head = HEAD.search(name) or PRETRAINING.search(name)
            if head and before and after and before != after:
                dropped.append(name)
            elif self.choice.fate(name.rpartition(".")[0], "others") == "left":
                left.append(name)
            else:
                lost.append(f"{name} {list(parameter.info.shape)}: only in the base")
        notices = self.found.notices
        if left:
            text = f"Left out, and in the base alone:\n{listed(left)}"
            notices.append(Notice("left-in-base", text, left[0]))
        if dropped:
            text = f"{after[0]} does not have the base's head:\n"
            notices.append(Notice("head-dropped", text + listed(dropped), dropped[0]))
        return lost


def _beginnings(one: str, other: str) -> tuple[str, str]:
    """What two names begin with before the end that they have in common."""
    pairs = zip(one[::-1], other[::-1], strict=False)
    common = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(one), len(other)))
    return one[: len(one) - common], other[: len(other) - common]


class _TiedNames(NamedTuple):
    """Embedding and head that are one matrix, by their names in memory."""

    embedding: str
    head: str


def _tied_names(layout: Layout) -> _TiedNames | None:
    if layout.tied is None:
        return None
    names = layout.holdings.names
    return _TiedNames(
        names.segments(layout.tied.embedding)[0].memory, names.segments(layout.tied.head)[0].memory
    )


def _all_parameters(layout: Layout, tied: _TiedNames | None) -> dict[str, ModelParameter]:
    """The parameters of a model, with the head that is its embedding."""
    found = parameters_of(layout.base, layout.holdings)
    return renamed(found, tied.embedding, tied.head) if tied else found


def _ordered(
    parts: Sequence[Counterpart], registered: Mapping[str, tuple[str, ...]]
) -> list[Counterpart]:
    """The same with the order in which modules register their stacks.

    Raises MatchError where several of a module are to be adapted and nobody knows their order.
    """
    modules: dict[str, dict[str, None]] = defaultdict(dict)
    for part in parts:
        if part.stack and part.fate == "factors":
            modules[part.module][part.unit.rpartition(".")[2]] = None
    orders: dict[str, Sequence[str]] = {}
    for module, names in modules.items():
        known = [order for end, order in registered.items() if f".{module}".endswith(f".{end}")]
        fitting = [order for order in known if set(names) <= set(order)]
        order = fitting[0] if fitting else WRITTEN.registered(list(names))
        if order is None:
            shown = ", ".join(names)
            raise MatchError(
                f"{module}: no model is known that registers {shown}, and in which order it does "
                "decides what PEFT makes of an adapter.",
                f"Leave all but one of them out, for instance --exclude {module}.{[*names][-1]}.",
            )
        orders[module] = order
    return [
        replace(part, stack=replace(
            part.stack, order=orders[part.module].index(part.unit.rpartition(".")[2])))
        if part.stack and part.module in orders else part
        for part in parts
    ]  # fmt: skip


def _resizable(name: str, source: ModelParameter, parameter: ModelParameter) -> bool:
    """Whether the two can be of one model though their shapes differ.

    Vocabularies and heads may have other rows.
    """
    # The bias of a masked-language head has no place in an adapter: PEFT does not load it.
    tokens = is_vocabulary(name) and not name.endswith(".bias")
    one, other = source.info.shape, parameter.info.shape
    one_axis = bool(one) and len(one) == len(other)
    return (tokens or HEAD.search(name) is not None) and one_axis and one[1:] == other[1:]


def _check_names(result: Counterparts, tuned: Checkpoint) -> None:
    """Refuse two tensors of one name; say where names in memory are not known."""
    names = [name for found in result.found for name in found.names]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise MatchError(
            f"Two tensors of {tuned.label} would both be {twice} in an adapter.",
            "The file holds one of them under an old name; save the model again.",
        )


def _by_layer(parts: Sequence[Counterpart]) -> list[Counterpart]:
    """Layers by number and name, as files do not have them; before and after them what else is."""

    def key(part: Counterpart) -> tuple[int, str, list[int], str, int]:
        numbers = numbers_of(part.module)
        unit, member = part.unit, 0 if part.name == part.unit else numbers_of(part.name)[-1]
        if numbers:
            return 1, pattern(part.module).partition("#")[0], numbers[:1], unit, member
        return (0 if "embed" in part.name else 2), "", [], unit, member

    return sorted(parts, key=key)


def _refuse(base: Checkpoint, tuned: Checkpoint, lost: list[str], misfits: list[str]) -> None:
    if misfits:
        raise MatchError(
            f"Tensors of {tuned.label} have other shapes than those of {base.label} "
            f"({len(misfits)} of {len(tuned.tensors)}):\n{listed(misfits)}",
            "Give the base that the tuned model was made from, or leave modules out with "
            "--exclude.",
        )
    if lost:
        shards = [c.source for c in (base, tuned) if _SHARD.search(c.source.name)]
        raise MatchError(
            f"Tensors are in one of the two models only ({len(lost)}):\n{listed(lost)}",
            f"{shards[0].name} is one shard of several; give its directory."
            if shards
            else "Finish the download, give the right base, or leave them out with --exclude.",
        )
