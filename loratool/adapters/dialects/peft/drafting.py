"""An adapter of another dialect as a PEFT directory: keys, and a config that says it all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.dialects.drafting import (
    alpha_for,
    exact_outcome,
    known_scale,
    low_rank,
)
from loratool.adapters.dialects.peft import names
from loratool.adapters.dialects.peft.config import rank_pattern
from loratool.adapters.dialects.peft.targets import extracted_config
from loratool.adapters.dialects.writing import Asked, Draft, Fate
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import LowRank
from loratool.models.layouts.layout import in_memory
from loratool.models.layouts.names import is_lookup
from loratool.notices import Notice
from loratool.storage.composed import transposed
from loratool.storage.computed import computed_tensor
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_MODEL
from loratool.storage.tensors import TensorInfo
from loratool.words import counted

#: A layer of one expert of several.
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")

_EXTRACT = "merge it, and extract a LoRA from the result"
_NO_PAIR = f"its change is no product of two factors; {_EXTRACT}"


def peft_draft(adapter: Adapter, asked: Asked) -> Draft:
    """A PEFT directory of an adapter of any dialect. Factors stay as they are: PEFT's config has a
    rank and an alpha for each module."""
    draft = Draft("safetensors", ADAPTER_MODEL, metadata={**adapter.metadata, "format": "pt"})
    written: list[LowRank] = []
    for path, module in adapter.modules.items():
        pair = low_rank(module)
        if isinstance(module, ExpertStack):
            draft.refuse(
                path, "a stack of experts is written by PEFT alone, and it is PEFT's already"
            )
        elif pair is None:
            draft.refuse(path, _NO_PAIR)
        elif _is_layer_of_tokens(pair) and pair.magnitude is not None:
            draft.refuse(path, "its magnitudes are of tokens, PEFT's of an embedding's columns")
        else:
            pair = _as_embedding(pair) if _is_layer_of_tokens(pair) else pair
            written.append(pair)
            _add(draft, pair, asked.dtype)
    for path, function in adapter.functions.items():
        draft.refuse(path, f"{function.algorithm} is no sum; {_EXTRACT}")
    adapted = {module.path: 1 for module in written}
    for name, info in adapter.replaced.items():
        draft.tensors[names.saved_key(name, name, adapted)] = info
        draft.whole[name] = info
        draft.fates.append(Fate(name, "exact", "saved whole"))
    for path in adapter.token_rows:
        draft.refuse(f"{path} (token rows)", "they are known in PEFT's own files only")
    draft.documents[ADAPTER_CONFIG] = _config(adapter, written, asked)
    apart = [module.path for module in written if _ONE_EXPERT.search(module.path)]
    if apart:
        text = (
            f"{counted(len(apart), 'module', 'is')} of one expert each, by the names of the Hub's "
            "files. PEFT on transformers 5 holds experts in stacks and does not find them there; "
            "`loratool merge` and transformers 4 do."
        )
        draft.notices.append(Notice("experts-apart", text, apart[0]))
    return draft


def _is_layer_of_tokens(pair: LowRank) -> bool:
    """Whether factors are those of a linear layer and belong to an embedding."""
    return pair.kind == "linear" and is_lookup(pair.path)


def _as_embedding(pair: LowRank) -> LowRank:
    return replace(pair, kind="embedding", a=transposed(pair.b), b=transposed(pair.a))


def _add(draft: Draft, pair: LowRank, dtype: str | None) -> None:
    path, outline = pair.path, pair.outline
    for (key, shape), info in zip(
        names.factor_shapes(outline, pair.rank), (pair.a, pair.b), strict=True
    ):
        if info.shape != shape:
            draft.refuse(path, f"its factors are {list(info.shape)}, PEFT's {list(shape)}")
            return
        draft.tensors[key] = _cast(info, dtype)
    if pair.magnitude is not None:
        draft.tensors[names.magnitude_key(path)] = _flat(pair, pair.magnitude)
    if pair.bias is not None:
        draft.tensors[names.bias_key(path)] = _cast(pair.bias, dtype)
    draft.pieces[path] = pair
    rounded = dtype is not None and any(t.dtype != dtype for t in (pair.a, pair.b))
    said = [f"{pair.method} as a product of two factors"] if pair.method != "LoRA" else []
    said += [f"written as {dtype}"] if rounded else []
    outcome = "rounded" if rounded else exact_outcome(pair)
    draft.fates.append(Fate(path, outcome, ", ".join(said), pair.rank, pair.rank))


def _flat(pair: LowRank, magnitude: TensorInfo) -> TensorInfo:
    """PEFT's magnitude of a linear layer is `[out]`, of a convolution `[1, out, 1, …]`."""
    out = pair.outline.out
    ones = (1,) * (len(pair.outline.inner) - 1)
    shape = (1, out, *ones) if pair.kind == "conv" else (out,)
    if magnitude.shape == shape:
        return magnitude
    name = f"{magnitude.name} {list(shape)}"
    return computed_tensor(name, shape, [magnitude], lambda m: m.reshape(shape), magnitude.dtype)


def _cast(info: TensorInfo, dtype: str | None) -> TensorInfo:
    if dtype is None or info.dtype == dtype:
        return info
    return computed_tensor(f"{info.name} ({dtype})", info.shape, [info], lambda v: v, dtype)


def _config(adapter: Adapter, written: Sequence[LowRank], asked: Asked) -> dict[str, Any]:
    base = asked.base
    naming = in_memory(base) if base is not None else None
    modules = {naming(n).rpartition(".")[0] for n in base.tensors} if base and naming else set()
    recipe = Recipe(
        outlines=[module.outline for module in written],
        ranks=[module.rank for module in written],
        saved=list(adapter.replaced),
        modules=modules,
        model_type=base.model_type if base else "",
        base_name=adapter.declared.base_name,
        task_type=adapter.declared.task or "CAUSAL_LM",
        transposes=adapter.stores_turned,
        tied=adapter.declared.ties_head,
    )
    config = extracted_config(recipe)
    alphas = [alpha_for(known_scale(m), m.rank) for m in written]
    usual = max(set(alphas), key=alphas.count, default=1.0)
    config["lora_alpha"] = int(usual) if usual == int(usual) else usual
    config["alpha_pattern"] = {}
    if len(set(alphas)) > 1:
        # Every module is named: PEFT takes a key for the end of longer paths too.
        by_path = {m.path: a for m, a in zip(written, alphas, strict=True)}
        config["alpha_pattern"] = {p: by_path[p] for p in sorted(by_path, key=lambda p: -len(p))}
    if len({m.rank for m in written}) > 1:
        config["rank_pattern"] = rank_pattern(recipe.outlines, recipe.ranks)
    config["use_dora"] = any(m.magnitude is not None for m in written)
    if any(m.bias is not None for m in written):
        config["lora_bias"] = True
    return config
