"""An adapter as litgpt's file: q, k and v in one pair, and what litgpt wants to know beside."""

from __future__ import annotations

from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.layers import HEAD, alike, unknown_base
from loratool.adapters.dialects.litgpt.config import (
    HYPERPARAMETERS,
    MODEL_CONFIG,
    OTHER_FLAGS,
    QKV_FLAGS,
)
from loratool.adapters.dialects.litgpt.families import LLAMA, family_of
from loratool.adapters.dialects.writing import Asked, Draft
from loratool.adapters.factors import LowRank
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.models.decoder import Decoder, decoder_of
from loratool.storage.composed import joined
from loratool.storage.filenames import LITGPT
from loratool.storage.tensors import TensorInfo
from loratool.storage.yamltext import dump_yaml

#: Types of bases that are described to litgpt here, as its own config.py has theirs.
_TYPES = ("llama", "mistral", "qwen2")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
#: What litgpt looks for beside the weights; other programs need no tokenizer with an adapter.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def litgpt_draft(adapter: Adapter, asked: Asked) -> Draft:
    """Raises AdapterError without a base, and for one that litgpt cannot be told of."""
    base = asked.base
    decoder = decoder_of(base.config) if base is not None else None
    if base is None or decoder is None or base.model_type not in _TYPES:
        raise AdapterError(
            "litgpt wants a description of the base, and the same modules in all its layers; "
            f"known are bases of {', '.join(_TYPES)}.",
            unknown_base(base),
        )
    model = model_config(base, decoder)
    draft = Draft("torch", LITGPT, within=("model",))
    made = alike(draft, adapter, asked, decoder, "litgpt", scaled=False)
    if made is None:
        return draft
    there = set(made.modules)
    if HEAD in there:
        _add(draft, HEAD, [made.pairs[HEAD]])
    for layer in range(decoder.layers):
        own, hub = f"transformer.h.{layer}.", f"model.layers.{layer}."
        qkv = [made.pairs[hub + module] for module in _QKV if module in there]
        if qkv:
            _add(draft, f"{own}attn.qkv", qkv)
        for name, module in LLAMA.modules.items():
            if module in there:
                _add(draft, own + name, [made.pairs[hub + module]])
    flags = [*zip(QKV_FLAGS, _QKV, strict=True), *zip(OTHER_FLAGS, _SAMPLES, strict=True)]
    alpha = int(made.alpha) if made.alpha == int(made.alpha) else made.alpha
    draft.documents[HYPERPARAMETERS] = dump_yaml({
        "checkpoint_dir": f"checkpoints/{adapter.declared.base_name or base.name}",
        "lora_r": made.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        **{flag: module in there for flag, module in flags},
    })  # fmt: skip
    draft.documents[MODEL_CONFIG] = dump_yaml(model)
    beside = [name for name in _TOKENIZER if base.folder.has(name)]
    base.folder.fetch(beside)
    draft.copies |= {name: base.folder.path / name for name in beside}
    return draft


#: A module that each of `OTHER_FLAGS` switches on.
_SAMPLES = ("self_attn.o_proj", "mlp.gate_proj", HEAD)


def _add(draft: Draft, own: str, pairs: list[LowRank]) -> None:
    for half, parts in (("A", [pair.a for pair in pairs]), ("B", [pair.b for pair in pairs])):
        draft.tensors[f"{own}.lora_{half}"] = _above(parts)


def _above(parts: list[TensorInfo]) -> TensorInfo:
    """Matrices of one width, one above the other."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    return joined(parts[0].name, (rows, parts[0].shape[1]), parts)


def model_config(base: Checkpoint, decoder: Decoder) -> dict[str, Any]:
    """model_config.yaml of the base. Raises AdapterError for what litgpt's layers have not."""
    config = base.config
    qwen = base.model_type == "qwen2"
    odd = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if odd or config.get("hidden_act", "silu") != "silu":
        raise AdapterError(
            f"litgpt's Llama has no {odd[0] if odd else config['hidden_act']}, as the base has.",
            "Convert to another dialect.",
        )
    heads = decoder.heads
    window = config.get("sliding_window") if config.get("use_sliding_window", not qwen) else None
    return {
        "name": _name(base.name, qwen),
        "hf_config": {"name": base.name},
        "block_size": config.get("max_position_embeddings") or 4096,
        "sliding_window_size": window,
        "vocab_size": decoder.vocabulary,
        "padded_vocab_size": decoder.vocabulary,
        "n_layer": decoder.layers,
        "n_head": heads.query,
        "n_query_groups": heads.kv,
        "head_size": heads.size,
        "n_embd": decoder.hidden,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "attn_bias": qwen,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": decoder.inner,
        **_rotary(config),
    }


def _name(name: str, qwen: bool) -> str:
    """The base's name, as it leads litgpt to the family on the way back, which goes by names."""
    if qwen and not name.lower().startswith(("qwen2.5", "qwq")):
        name = f"Qwen2.5-{name}"
    plain = name.lower()
    leads_astray = family_of({"name": name, "mlp_class_name": "LLaMAMLP"}, "") is not LLAMA
    named = ("gemma", "olmo-2-", "qwen3", *(() if qwen else ("qwen2.5", "qwq")))
    return "Llama" if leads_astray or plain.startswith(named) else name


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = said.get("rope_theta") or config.get("rope_theta") or 10000
    kind = said.get("rope_type") or said.get("type") or "default"
    found: dict[str, Any] = {"rope_base": int(base)}
    if kind == "llama3":
        found["rope_adjustments"] = {
            "factor": said.get("factor"), "low_freq_factor": said.get("low_freq_factor"),
            "high_freq_factor": said.get("high_freq_factor"),
            "original_max_seq_len": said.get("original_max_position_embeddings"),
        }  # fmt: skip
    elif kind == "linear":
        found["rope_condense_ratio"] = said.get("factor")
    elif kind != "default":
        raise AdapterError(
            f"litgpt has no rotary positions of the kind {kind!r}, as the base has.",
            "Convert to another dialect.",
        )
    return found
