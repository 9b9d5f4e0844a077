"""A quantised base as the plain model that it stands for.

Weights are recognised module by module, from their tensors; config.json gives parameters. What a
model says of itself and what its files hold may differ: the tensors decide, and what cannot be read
is refused (`refusals`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.declared import quantisation_of
from loratool.models.quantised.formats.awq import FORMATS as AWQ
from loratool.models.quantised.formats.bitsandbytes import FORMATS as BITSANDBYTES
from loratool.models.quantised.formats.fp4 import FORMATS as FP4
from loratool.models.quantised.formats.fp8 import FORMATS as FP8
from loratool.models.quantised.formats.gptq import FORMATS as GPTQ
from loratool.models.quantised.formats.hqq import FORMATS as HQQ
from loratool.models.quantised.formats.llm_int8 import FORMATS as LLM_INT8
from loratool.models.quantised.formats.packed import FORMATS as PACKED
from loratool.models.quantised.formats.torchao import FORMATS as TORCHAO
from loratool.models.quantised.module import (
    ACTIVATIONS,
    Format,
    Module,
    Quantisation,
    gathered,
    read_descriptions,
)
from loratool.models.quantised.refusals import (
    is_plain,
    packed_among,
    refuse_method,
    refuse_online,
    refuse_unread,
)
from loratool.models.quantised.rescaling import rescaled_by
from loratool.models.quantised.scheme import QuantisedTensor, quantised
from loratool.storage.tensors import TensorInfo

#: Every format that is read; the first one that claims a module has it.
FORMATS: tuple[Format, ...] = (
    *BITSANDBYTES, *LLM_INT8, *AWQ, *GPTQ, *HQQ, *TORCHAO, *FP4, *PACKED, *FP8,
)  # fmt: skip


@dataclass
class Dequantised(Checkpoint):
    """The plain model that a quantised one stands for: `tensors` has its weights as they would be
    there, and none of the parts that they are made of.

    `packed` is what the files hold; `weights` those that are quantised, by name.
    """

    packed: Checkpoint = field(kw_only=True)
    settings: Quantisation = field(kw_only=True)
    weights: dict[str, QuantisedTensor] = field(kw_only=True)
    #: Tensors of the quantisation that belong to no single weight.
    extras: frozenset[str] = field(default=frozenset(), kw_only=True)
    #: What its weights were rescaled by, so that they are others than the original's; "" for none.
    rescaled_by: str = field(default="", kw_only=True)

    @cached_property
    def owners(self) -> dict[str, str]:
        """The weights that tensors of the files are there for, by the names of these."""
        return {
            part.name: name
            for name, weight in self.weights.items()
            for part in weight.stored_as.all_parts
        }

    def is_part(self, info: TensorInfo) -> bool:
        """Whether a tensor of the files is a part of a quantised weight, or goes with one."""
        own = info is self.packed.tensors.get(info.name)
        return own and (info.name in self.owners or info.name in self.extras)

    @property
    def files(self) -> list[Path]:
        return self.packed.files

    def fetch(self, tensors: Iterable[str] | None = None) -> None:
        if tensors is None:
            self.packed.fetch()
        else:
            super().fetch(tensors)

    def identity(self) -> str:
        return self.packed.identity()

    @property
    def title(self) -> str:
        """What it is quantised as, for people: "NF4", or several, the most common first."""
        counts = Counter(weight.stored_as.title for weight in self.weights.values())
        return " and ".join(title for title, _ in counts.most_common())

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def as_stored(base: Checkpoint) -> Checkpoint:
    """The model as its files hold it."""
    return base.packed if isinstance(base, Dequantised) else base


def dequantised_if_read(base: Checkpoint) -> Checkpoint:
    """The same, or what the files hold where that is in a form that is not read: for those who only
    say what a model is."""
    try:
        return dequantised(base)
    except BaseError:
        return base


def dequantised(base: Checkpoint, partial: bool = False) -> Checkpoint:
    """The same base, or where its weights are quantised the plain model that they stand for.

    Raises BaseError where they are in a form that is not read, or incomplete; of a `partial` base
    those are left out.
    """
    settings = quantisation_of(base)
    modules = gathered(base, FORMATS, settings)
    claimed: dict[str, tuple[Module, Format]] = {}
    for name, module in modules.items():
        form = next((form for form in FORMATS if form.claims(module)), None)
        if form is not None:
            claimed[name] = module, form
    if not claimed and is_plain(base):
        refuse_online(base, settings)
    if not claimed and (partial or is_plain(base)):
        return base
    if not partial:
        refuse_method(base, settings)
    read_descriptions(
        (module for module, _ in claimed.values()),
        frozenset(role for form in FORMATS for role in form.descriptions),
    )
    weights: dict[str, QuantisedTensor] = {}
    for name, (module, form) in claimed.items():
        try:
            weights[name] = quantised(name, form.scheme(module))
        except BaseError:
            if not partial:
                raise
    names = {t.name: n for n, weight in weights.items() for t in weight.stored_as.all_parts}
    extras = frozenset(
        info.name
        for module in modules.values()
        for role, info in module.tensors.items()
        if role in ACTIVATIONS and info.name not in names
    )
    others = base.tensors.keys() - names.keys() - extras
    if partial:
        parts = {info.name for m, _ in claimed.values() for info in m.tensors.values()}
        extras |= others & (parts | set(packed_among(base, others)))
    else:
        refuse_unread(base, settings, others)
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}
    for shard, held in base.shards.items():
        for name in held:
            weight = names.get(name)
            if name in extras:
                continue
            if weight is None:
                tensors[name] = base.tensors[name]
                shards.setdefault(shard, []).append(name)
            elif name == weights[weight].stored_as.main.name:
                tensors[weight] = weights[weight]
                shards.setdefault(shard, []).append(weight)
    return Dequantised(
        base.source, base.folder, base.config, tensors, shards, base.metadata, base.notes,
        packed=base, settings=settings, weights=weights, extras=extras,
        rescaled_by=rescaled_by(base, settings, (w.stored_as for w in weights.values())),
    )  # fmt: skip
