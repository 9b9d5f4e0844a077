"""An adapter of any dialect as llama.cpp loads it: one alpha, what differs from it in B.

llama.cpp's own script writes `lora_alpha` of the config and nothing else of the scale, so that
rsLoRA and alpha_pattern are lost there; here B takes what a module's scale is more than alpha over
its rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import (
    common_rank,
    fitted,
    known_scale,
    low_rank,
    refuse_all,
)
from loratool.adapters.dialects.gguf.names import (
    Architecture,
    Named,
    architecture_of,
    named_here,
    named_there,
)
from loratool.adapters.dialects.gguf.reading import ADAPTER_KIND, ALPHA, ARCHITECTURE, KIND
from loratool.adapters.dialects.stackparts import StackParts
from loratool.adapters.dialects.writing import Asked, Draft
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors, LowRank
from loratool.models.checkpoint import Checkpoint
from loratool.models.heads import heads_of, pairs_together
from loratool.models.layouts.tying import head_of
from loratool.storage.composed import joined, transposed
from loratool.storage.computed import computed_tensor
from loratool.storage.ggufwriting import TypedValue
from loratool.storage.tensors import TensorInfo

_WEIGHTS = "adapter.gguf"
_NO_PLACE = {
    "replaced": "llama.cpp's adapters hold factors only; merge it, and convert the model",
    "rows": "llama.cpp's adapters hold factors only; merge it, and convert the model",
    "functions": "llama.cpp has LoRA only; merge it, and extract a LoRA from the result",
}
#: What stands before the names of a language model that is a part of another one.
_PARTS = ("model.language_model.", "language_model.model.", "language_model.")


def gguf_draft(adapter: Adapter, asked: Asked) -> Draft:
    """Refuses what has no place: DoRA, biases, convolutions, whole tensors, unknown models."""
    draft = Draft("gguf", _WEIGHTS)
    refuse_all(draft, adapter, _NO_PLACE)
    base = asked.base
    architecture = architecture_of(base.model_type) if base is not None else None
    if base is None or architecture is None:
        why = "llama.cpp's names and rows depend on the base: say --base"
        if base is not None:
            kind = base.model_type or "without a config.json"
            why = f"llama.cpp's names for a base that is {kind} are not known here"
        for path in adapter.modules:
            draft.refuse(path, why)
        return draft
    _Draft(draft, adapter, base, architecture, asked.dtype or "F32").fill()
    return draft


class _Draft:
    def __init__(
        self,
        draft: Draft,
        adapter: Adapter,
        base: Checkpoint,
        architecture: Architecture,
        dtype: str,
    ) -> None:
        self._draft = draft
        self._adapter = adapter
        self._base = base
        self._architecture = architecture
        self._dtype = dtype
        self._heads = heads_of(base.config)
        #: By llama.cpp's name: the pair of each layer, and those of experts by their number.
        self._layers: dict[str, LowRank] = {}
        self._experts: dict[str, dict[int, LowRank]] = defaultdict(dict)

    def fill(self) -> None:
        parts = StackParts(self._adapter, self._base)
        for path, module in self._adapter.modules.items():
            why = _why_not(module) or self._take(path, module, parts)
            if why:
                self._draft.refuse(path, why)
        pairs = [
            *self._layers.values(),
            *(p for own in self._experts.values() for p in own.values()),
        ]
        alpha = _common_alpha(pairs)
        for name, pair in self._layers.items():
            self._add(name, pair, alpha)
        for name, own in self._experts.items():
            self._add_experts(name, own, alpha)
        self._draft.metadata |= self._values(alpha)

    def _take(self, path: str, module: Factors, parts: StackParts) -> str:
        """Put a module under llama.cpp's name for it; or why there is none."""
        if isinstance(module, ExpertStack):
            experts = parts.of_stack(path, module)
            if isinstance(experts, str):
                return experts
            return next(filter(None, (self._put(name, pair) for name, pair in experts.items())), "")
        pair = low_rank(module)
        if pair is None:
            return "its change is no product of two factors"
        name = parts.hub_path(module)
        if name is None:
            return "the base holds its weight as a part of another, or in parts"
        return self._put(name, pair)

    def _put(self, name: str, pair: LowRank) -> str:
        for part in _PARTS:
            if name.startswith(part):
                name = f"model.{name.removeprefix(part)}".replace("model.lm_head", "lm_head")
        own = named_here(name, self._architecture)
        named = named_there(own, self._architecture) if own else None
        if own is None or named is None:
            return f"llama.cpp has no name for {name} in its architecture {self._architecture.name}"
        if pair.kind == "embedding" and own != "token_embd":
            return "llama.cpp has adapters of the token embedding and of no other"
        if own == "token_embd" and pair.kind != "embedding":
            return "llama.cpp looks tokens up, and this is a pair for a linear layer"
        if own in ("token_embd", "output") and self._is_tied():
            # Its runtime applies the pair of a tensor wherever that is used, and aborts at this.
            return (
                "embedding and head are one matrix in this base, and llama.cpp has no adapter of "
                "one of them alone"
            )
        if named.has_experts:
            number = _number_in(name)
            if number in self._experts[own]:
                return f"another module is {name} too"
            self._experts[own][number] = pair
            return ""
        if own in self._layers:
            return f"another module is {name} too"
        if named.rotary and not self._fits(pair, named):
            return "it has not the rows of the heads that config.json of the base says"
        self._layers[own] = pair
        return ""

    def _is_tied(self) -> bool:
        embedding = self._architecture.ends["token_embd"]
        return head_of(self._base, embedding) is not None

    def _count(self, named: Named) -> int:
        assert self._heads is not None
        return self._heads.kv if named.rotary == "kv" else self._heads.query

    def _fits(self, pair: LowRank, named: Named) -> bool:
        heads = self._heads
        return heads is not None and pair.shape[0] == self._count(named) * heads.size

    def _add(self, own: str, pair: LowRank, alpha: float) -> None:
        named = named_there(own, self._architecture)
        assert named is not None
        found = fitted(pair, pair.rank, alpha / pair.rank, self._dtype)
        a, b = found.a, found.b
        if pair.kind == "embedding":
            a = transposed(a)
        if named.rotary:
            b = pairs_together(b, self._count(named))
        self._write(own, a, b)
        self._draft.pieces[named.path] = pair
        self._draft.fates.append(found.fate)

    def _add_experts(self, own: str, pairs: dict[int, LowRank], alpha: float) -> None:
        """All experts of a layer in one tensor; those without factors are zeros there."""
        named = named_there(own, self._architecture)
        assert named is not None
        rank = common_rank(list(pairs.values()))
        count = max(_experts_of(self._base), 1 + max(pairs))
        shown = {n: fitted(pair, rank, alpha / rank, self._dtype) for n, pair in pairs.items()}
        first = next(iter(shown.values()))
        parts = [shown.get(n) for n in range(count)]
        a = [one.a if one else _zeros(first.a) for one in parts]
        b = [one.b if one else _zeros(first.b) for one in parts]
        self._write(own, joined(f"{own} A", (count, *first.a.shape), a),
                    joined(f"{own} B", (count, *first.b.shape), b))  # fmt: skip
        told = {fate.what for fate in self._draft.fates}
        for number in range(count):
            path = named.path.format(number)
            one = shown.get(number)
            if one is None:
                self._draft.pieces[path] = _nothing(first.a, first.b, path)
            else:
                self._draft.pieces[path] = pairs[number]
                if one.fate.what not in told:
                    self._draft.fates.append(one.fate)
                    told.add(one.fate.what)

    def _write(self, own: str, a: TensorInfo, b: TensorInfo) -> None:
        self._draft.tensors[f"{own}.weight.lora_a"] = a
        self._draft.tensors[f"{own}.weight.lora_b"] = b

    def _values(self, alpha: float) -> dict[str, Any]:
        texts = {
            ARCHITECTURE: self._architecture.name, KIND: "adapter", ADAPTER_KIND: "lora",
            "general.name": self._adapter.name,
        }  # fmt: skip
        if self._adapter.declared.base_name:
            texts |= {"general.base_model.0.name": self._adapter.declared.base_name}
        values: dict[str, Any] = {key: TypedValue("string", text) for key, text in texts.items()}
        if self._adapter.declared.base_name:
            values["general.base_model.count"] = TypedValue("uint32", 1)
        return {**values, ALPHA: TypedValue("float32", alpha)}


def _why_not(module: Factors) -> str:
    """Why llama.cpp has no place for a module; "" where it has."""
    if module.magnitude is not None:
        return "llama.cpp has no magnitudes (DoRA); merge it, and convert the model"
    if module.bias is not None:
        return "llama.cpp has no biases beside factors; merge it, and convert the model"
    if module.kind not in ("linear", "embedding", "experts"):
        return "llama.cpp has adapters of linear layers, embeddings and experts only"
    return ""


def _common_alpha(pairs: Sequence[LowRank]) -> float:
    """The alpha of a file that has one: that of most parameters, as float32 has it, and not 0,
    which llama.cpp takes for none."""
    weights: dict[float, int] = defaultdict(int)
    for pair in pairs:
        scale = known_scale(pair)
        is_own = pair.alpha is not None and pair.alpha / pair.rank == scale
        alpha = float(np.float32(pair.alpha if is_own else scale * pair.rank))
        weights[alpha] += pair.parameters
    weights.pop(0.0, None)
    return max(weights, key=lambda alpha: weights[alpha], default=1.0)


def _number_in(path: str) -> int:
    """The number of an expert in a path."""
    return int(path.rpartition(".experts.")[2].partition(".")[0])


def _experts_of(base: Checkpoint) -> int:
    text = base.config.get("text_config") or base.config
    found = text.get("num_local_experts") or text.get("num_experts")
    return found if type(found) is int else 0


def _zeros(like: TensorInfo) -> TensorInfo:
    zeros: Callable[[Any], Any] = np.zeros_like
    return computed_tensor(f"zeros like {like.name}", like.shape, [like], zeros, like.dtype)


def _nothing(a: TensorInfo, b: TensorInfo, path: str) -> LowRank:
    """The pair of an expert that has none."""
    return LowRank(path, "linear", _zeros(a), _zeros(b), None, 1.0)
