"""Which tensors of a base and of its fine-tune belong together, and how an adapter can hold each.

Decided from headers alone, by these rules:

- 2-D weights and convolutions become factors, embeddings of tokens too.
- Routers, classifiers, other embeddings, bare parameters and everything else are saved whole; so
  is a vocabulary that grew or shrank, and a head of another shape or a new one.
- Norms and biases are saved whole on request; those of a module that is saved, with it.
- What the two do not share otherwise is refused: they are not of one architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loratool.adapters.factors import Kind, ModuleShape
from loratool.errors import MatchError, listed
from loratool.extracting.kinds import Group, group_of
from loratool.extracting.selection import Fate, Selection
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.layout import Layout, in_memory
from loratool.models.layouts.names import HEAD, PRETRAINING, is_legacy_buffer, is_vocabulary
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.place import Place
from loratool.notices import Notice
from loratool.paths import numbers_of, pattern
from loratool.storage.tensors import TensorInfo

#: The file name of one shard of several.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class Counterpart:
    """One tensor of the tuned model, `name` as a model in memory has it, and the base's.

    `place` is where in the base its factors go. `base` is None for a tensor that only the tuned
    model has. `fate` is what becomes of it if it has changed. `twin` is the head
    that is the same matrix in both models, for an embedding that has one. `shared` is set for the
    matrix that encoder, decoder and head have together, for which no adapter has a place.
    """

    name: str
    place: Place
    base: TensorInfo | None
    tuned: TensorInfo
    group: Group
    fate: Fate
    twin: str = ""
    shared: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        """What is read to compare the two."""
        return self.tuned.nbytes + (self.base.nbytes if self.base is not None else 0)

    @property
    def is_comparable(self) -> bool:
        """Whether there is a difference: both sides there, of one shape."""
        return self.base is not None and self.base.shape == self.tuned.shape

    @property
    def outline(self) -> ModuleShape:
        """Where its factors go. An embedding's product is `(B·A)ᵀ`, and so is a Conv1D's."""
        rows, *inner = self.tuned.shape
        kind: Kind = {"embeddings": "embedding", "convs": "conv"}.get(self.group, "linear")  # type: ignore[assignment]
        if self.place.transposed:
            return ModuleShape(self.module, kind, inner[0], (rows,))
        return ModuleShape(self.module, kind, rows, tuple(inner))

    @property
    def outlines(self) -> list[ModuleShape]:
        """Where its factors go: the twin's are the same two, transposed."""
        own = self.outline
        if not self.twin:
            return [own]
        return [own, ModuleShape(self.twin.rpartition(".")[0], "linear", own.inner[0], (own.out,))]

    @property
    def names(self) -> list[str]:
        return [self.name, *([self.twin] if self.twin else [])]


@dataclass
class Counterparts:
    """All tensors of a fine-tune."""

    found: list[Counterpart] = field(default_factory=list)
    fan_in_fan_out: bool = False
    notices: list[Notice] = field(default_factory=list)

    @property
    def modules(self) -> set[str]:
        return {name.rpartition(".")[0] for c in self.found for name in c.names}


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
    layout, own = Layout(base), Layout(tuned)
    naming = choose_naming(
        layout, [Wanted(name, info.shape, whole=True) for name, info in tuned.tensors.items()]
    )
    named = in_memory(tuned)
    result = Counterparts()
    taken: set[str] = set()
    lost, misfits = [], []
    both_tied = layout.tied is not None and own.tied is not None and own.tied.certain
    for name, info in _tensors(tuned, own).items():
        base_name = naming(name)
        source = base.tensors.get(base_name)
        if source is None and layout.tied is not None and base_name == layout.tied.head:
            source = base.tensors[layout.tied.embedding]
        taken.add(base_name)
        if both_tied and own.tied is not None and name == own.tied.head:
            continue  # the embedding stands for it
        path = named(max(name, base_name, key=len))
        found = _counterpart(path, source, info, tuned, own, choice)
        found = replace(found, place=replace(found.place, tensor=base_name),
                        shared=layout.shared_alias(base_name))  # fmt: skip
        if both_tied and own.tied is not None and name == own.tied.embedding:
            twin = named(own.tied.head)
            found = replace(found, twin=twin)
            if choice.fate(twin.rpartition(".")[0], "embeddings") == "left":
                found = replace(found, fate="left")
        if source is None and found.fate != "left" and not _is_new_head(base_name, base):
            lost.append(f"{name} {list(info.shape)}: only in the tuned model")
        elif source is not None and not _fits(found, source):
            misfits.append(f"{name}: base {list(source.shape)}, tuned {list(info.shape)}")
        result.found.append(found)
    lost += _missing(base, tuned, layout, taken, choice, result)
    _refuse(base, tuned, lost, misfits)
    _check_names(result, tuned)
    result.found = _by_layer(result.found)
    result.fan_in_fan_out = any(c.place.transposed and c.group == "linears" for c in result.found)
    choice.check({*result.modules, *(name.rpartition(".")[0] for name in base.tensors)})
    return result


def _check_names(result: Counterparts, tuned: Checkpoint) -> None:
    """Refuse two tensors of one name; say where names in memory are not known."""
    names = [name for found in result.found for name in found.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MatchError(
            f"Two tensors of {tuned.label} would both be {twice} in an adapter.",
            "The file holds one of them under an old name; save the model again.",
        )


def _by_layer(parts: Sequence[Counterpart]) -> list[Counterpart]:
    """Layers by number and name, as files do not have them; before and after them what else is."""

    def key(part: Counterpart) -> tuple[int, str, list[int], str]:
        if numbers := numbers_of(part.module):
            return 1, pattern(part.module).partition("#")[0], numbers[:1], part.name
        return (0 if "embed" in part.name else 2), "", [], part.name

    return sorted(parts, key=key)


def _tensors(checkpoint: Checkpoint, layout: Layout) -> dict[str, TensorInfo]:
    """The tensors of a model, with the head that is its embedding, but without old buffers."""
    tensors = {
        name: info
        for name, info in checkpoint.tensors.items()
        if not is_legacy_buffer(name, info.shape)
    }
    if layout.tied is not None and layout.tied.certain:
        tensors[layout.tied.head] = checkpoint.tensors[layout.tied.embedding]
    return tensors


def _counterpart(
    name: str,
    source: TensorInfo | None,
    info: TensorInfo,
    tuned: Checkpoint,
    layout: Layout,
    choice: Selection,
) -> Counterpart:
    group = group_of(name, info, tuned)
    module = name.rpartition(".")[0]
    fate = choice.fate(module, group)
    if fate == "factors" and group == "embeddings" and not is_vocabulary(f"{module}.weight"):
        fate = "whole"  # position embeddings do not look up what they are given
    if source is None or source.shape != info.shape:
        fate = "left" if fate == "left" else "whole"
    elif fate == "factors" and not (source.is_float and info.is_float):
        fate = "whole"
    kind = {"embeddings": "embedding", "linears": "linear"}.get(group, "")
    shape = info.shape[0] if info.shape else 1, math.prod(info.shape[1:])
    place = replace(layout.place(info.name, kind, False, shape), tensor=name)
    return Counterpart(name, place, source, info, group, fate)


def _is_new_head(name: str, base: Checkpoint) -> bool:
    """Whether a tensor that the base lacks belongs to a head that it lacks.

    Known heads, and modules at the top of the model that are no stack of layers.
    """
    module = name.rpartition(".")[0]
    if not module or any(t.startswith(f"{module}.") for t in base.tensors):
        return False
    top = module.partition(".")[0]
    layered = bool(numbers_of(module))
    new = not any(t.partition(".")[0] == top for t in base.tensors)
    return HEAD.search(module) is not None or (new and not layered)


def _fits(found: Counterpart, source: TensorInfo) -> bool:
    """Whether the two tensors can be of one model, or the user leaves this one out.

    Vocabularies and heads may have other rows.
    """
    if found.is_comparable or found.fate == "left":
        return True
    # The bias of a masked-language head has no place in an adapter: PEFT does not load it.
    tokens = is_vocabulary(found.name) and not found.name.endswith(".bias")
    resizable = tokens or HEAD.search(found.name) is not None
    one_axis = bool(source.shape) and len(source.shape) == len(found.tuned.shape)
    return resizable and one_axis and source.shape[1:] == found.tuned.shape[1:]


def _missing(
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    taken: set[str],
    choice: Selection,
    result: Counterparts,
) -> list[str]:
    """What only the base has. Heads that the tuned model's class has no use for are no loss."""
    lost, dropped, left = [], [], []
    for name, info in base.tensors.items():
        if name in taken or is_legacy_buffer(name, info.shape):
            continue
        if layout.tied is not None and name == layout.tied.head:
            continue
        before, after = (c.config.get("architectures") or [] for c in (base, tuned))
        head = HEAD.search(name) or PRETRAINING.search(name)
        if head and before and after and before != after:
            dropped.append(name)
        elif choice.fate(name.rpartition(".")[0], "others") == "left":
            left.append(name)
        else:
            lost.append(f"{name} {list(info.shape)}: only in the base")
    if left:
        text = f"Left out, and in the base alone:\n{listed(left)}"
        result.notices.append(Notice("left-in-base", text, left[0]))
    if dropped:
        text = f"{tuned.config['architectures'][0]} does not have the base's head:\n"
        result.notices.append(Notice("head-dropped", text + listed(dropped), dropped[0]))
    return lost


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
