"""GGUF adapters read as llama.cpp reads them: pairs by tensor, one alpha, names by architecture.

What its runtime does (src/llama-adapter.cpp and llama-graph.cpp): the factor of a product is
`adapter.lora.alpha` over the rank of the pair, or 1 where alpha is 0 or absent; tensors of norms
are passed over; the embedding's A is stored `[vocab, r]`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects.gguf.names import (
    ARCHITECTURES,
    Architecture,
    Named,
    architecture_of,
    named_there,
)
from loratool.adapters.dialects.rotary import RotaryRows
from loratool.adapters.dialects.stacks import check_experts
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
    refuse_unknown,
)
from loratool.adapters.factors import LowRank
from loratool.adapters.told import Scaling, scaling
from loratool.errors import AdapterError, listed
from loratool.models.checkpoint import Checkpoint
from loratool.models.heads import heads_of
from loratool.notices import Notice
from loratool.storage.composed import member, transposed
from loratool.storage.filenames import CONFIG
from loratool.storage.tensors import TensorInfo
from loratool.words import counted, enumerated

ARCHITECTURE = "general.architecture"
KIND, ADAPTER_KIND = "general.type", "adapter.type"
ALPHA = "adapter.lora.alpha"
_TOKENS = "adapter.alora.invocation_tokens"

FACTOR = re.compile(r"(?P<tensor>.+)\.weight\.lora_(?P<side>[ab])")
_NORM = re.compile(r".+_norm\.weight")

_Pairs = dict[str, dict[str, TensorInfo]]


def fill_gguf(adapter: Adapter, base: Checkpoint | None) -> None:
    """Sort the tensors of a GGUF adapter into modules, in place; see `Dialect.read`."""
    _note_kind(adapter)
    pairs = _sorted(adapter)
    architecture = _architecture(adapter, base)
    if architecture is not None:
        _Reader(adapter, architecture, base).read(pairs)
    refuse_empty(adapter)
    refuse_shapes(adapter, {})
    refuse_unknown(adapter)


def _note_kind(adapter: Adapter) -> None:
    values = adapter.values
    adapter.producer = "llama.cpp"
    adapter.declared = Declared(
        base_name=_base_name(values),
        settings=tuple(
            (what, str(values[key]))
            for what, key in (("architecture", ARCHITECTURE), ("alpha", ALPHA))
            if key in values
        ),
    )
    if values.get(_TOKENS):
        text = (
            f"{_TOKENS}: it acts on what comes after these tokens only (activated LoRA), so no "
            "merged weight does the same."
        )
        notice = Notice("alora-invocation-tokens", text, str(adapter.weights), refused=True)
        adapter.notices.append(notice)


def _base_name(values: Mapping[str, Any]) -> str | None:
    """The id on the Hub of the base, by what the converter notes of it."""
    address = str(values.get("general.base_model.0.repo_url") or "")
    found = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)", address)
    return found[1] if found else None


def _sorted(adapter: Adapter) -> _Pairs:
    """The factors by tensor and side. Norms have no effect in llama.cpp, others no meaning."""
    pairs: _Pairs = defaultdict(dict)
    for name, info in adapter.tensors.items():
        factor = FACTOR.fullmatch(name)
        if factor:
            pairs[factor["tensor"]][factor["side"]] = info
        elif _NORM.fullmatch(name):
            adapter.inert.append(name)
        else:
            adapter.unknown.append(name)
    if adapter.inert:
        text = (
            f"{counted(len(adapter.inert), 'norm')} in the file: llama.cpp passes over them, and "
            f"they are no part of what is read.\n{listed(adapter.inert)}"
        )
        adapter.notices.append(Notice("norms-passed-over", text, adapter.inert[0]))
    return pairs


def _architecture(adapter: Adapter, base: Checkpoint | None) -> Architecture | None:
    """What the names in the file are of; where that is not known there is a notice."""
    said = adapter.values.get(ARCHITECTURE)
    found = ARCHITECTURES.get(said) if isinstance(said, str) else None
    if found is None:
        text = (
            f"{ARCHITECTURE} is {said!r}: how its tensors are called on the Hub is not known here. "
            f"Known are {', '.join(ARCHITECTURES)}. Convert the PEFT adapter that it was made of."
        )
        adapter.notices.append(
            Notice("gguf-architecture", text, str(adapter.weights), refused=True)
        )
        return None
    wanted = architecture_of(base.model_type) if base is not None else None
    if base is not None and wanted not in (None, found):
        text = (
            f"The adapter is for llama.cpp's architecture {said} ({enumerated(found.types)}), and "
            f"{base.label} is {base.model_type}."
        )
        adapter.notices.append(
            Notice("gguf-architecture", text, str(adapter.weights), refused=True)
        )
    return found


class _Reader:
    def __init__(
        self, adapter: Adapter, architecture: Architecture, base: Checkpoint | None
    ) -> None:
        self._adapter = adapter
        self._architecture = architecture
        self._rows = RotaryRows(heads_of(base.config) if base is not None else None)
        self._alpha = _alpha(adapter)
        self._experts = 0
        self._wrong: list[str] = []

    def read(self, pairs: _Pairs) -> None:
        adapter = self._adapter
        halves = {}
        for tensor, pair in pairs.items():
            named = named_there(tensor, self._architecture)
            if named is None:
                adapter.unknown += [info.name for info in pair.values()]
            elif len(pair) < 2:
                halves[tensor] = [f"lora_{side}" for side in pair]
            elif named.has_experts:
                self._add_experts(tensor, named, pair["a"], pair["b"])
            else:
                self._add(tensor, named, pair["a"], pair["b"])
        refuse_halves(adapter, halves, "lora_a and lora_b")
        refuse_modules(
            adapter, "pair-mismatch",
            "has no factors of experts, which are A [E, r, in] and B [E, out, r]", self._wrong,
        )  # fmt: skip
        self._rows.note(adapter, [CONFIG])

    def _add(self, tensor: str, named: Named, a: TensorInfo, b: TensorInfo) -> None:
        said = self._scaling(tensor, b)
        is_embedding = tensor == "token_embd" and len(a.shape) == 2
        if is_embedding:
            a = transposed(a)
        if named.rotary and len(b.shape) == 2:
            b = self._rows.ordered(b, named.path, kv=named.rotary == "kv")
        self._adapter.modules[named.path] = LowRank(
            named.path, "embedding" if is_embedding else "linear", a, b, said.alpha, said.scale,
            scale_from=said.origin,
        )  # fmt: skip

    def _add_experts(self, tensor: str, named: Named, a: TensorInfo, b: TensorInfo) -> None:
        """Each expert of a layer as a module of its own, as the Hub's files have them."""
        shapes = a.shape, b.shape
        if {len(shape) for shape in shapes} != {3} or a.shape[0] != b.shape[0]:
            self._wrong.append(f"{tensor}: A {list(a.shape)}, B {list(b.shape)}")
            return
        self._experts += a.shape[0]
        check_experts(self._adapter, self._experts)
        said = self._scaling(tensor, b)
        for number in range(a.shape[0]):
            path = named.path.format(number)
            self._adapter.modules[path] = LowRank(
                path, "linear", member(a, number), member(b, number), said.alpha, said.scale,
                scale_from=said.origin,
            )  # fmt: skip

    def _scaling(self, tensor: str, b: TensorInfo) -> Scaling:
        rank = b.shape[-1] if b.shape else 0
        told = self._adapter.told
        if self._alpha or told.says_scale:
            return scaling(told, rank or 1, alpha=self._alpha, origin=ALPHA, where=tensor)
        return Scaling(None, 1.0, "no alpha")


def _alpha(adapter: Adapter) -> float | None:
    """The alpha of all modules; None for the scale of 1 that llama.cpp takes without one.

    Raises AdapterError for what is no number.
    """
    alpha = adapter.values.get(ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | None):
        raise AdapterError(f"{adapter.weights}: {ALPHA} is {alpha!a}, no number.", "Convert again.")
    if alpha is not None and not math.isfinite(alpha):
        raise AdapterError(f"{adapter.weights}: {ALPHA} is {alpha}.", "Convert the adapter again.")
    if alpha or adapter.told.says_scale:
        return alpha or None
    text = (
        f"{ALPHA} is {'0' if alpha is not None else 'not there'}, for which llama.cpp takes the "
        "product as it is, with a scale of 1. So it is read here; --alpha or --scale say otherwise."
    )
    adapter.notices.append(Notice("alpha-absent", text, str(adapter.weights)))
    return None
