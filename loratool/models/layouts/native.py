"""The names of Meta's and Mistral's own files, which are not those of transformers.

There `layers.0.attention.wq.weight` is q_proj, and config.json is called params.json. In the rows
of wq and wk the two halves of a rotary pair lie side by side, `[heads, dim/2, 2]`; in those of
transformers all first halves of a head come before all second ones, `[heads, 2, dim/2]`
(transformers' convert_llama_weights_to_hf.py and convert_mistral_weights_to_hf.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loratool.errors import BaseError
from loratool.models.heads import heads_of
from loratool.models.layouts.rules import NameRule, apply_rules
from loratool.storage.fields import is_count
from loratool.storage.filenames import CONFIG, PARAMS
from loratool.storage.tensors import TensorInfo
from loratool.words import counted

#: What the config of a model says that is read with such names; no file has it.
NATIVE_NAMES = "native_names"

_LAYER, _THERE = "^.layers.#", "model.layers.#"

#: What a native name is in transformers' files, as rules of `table`. An order names the field of a
#: config with the number of heads whose rows lie so.
NATIVE_RULES = tuple(
    NameRule.read(rule)
    for rule in (
        ("^.tok_embeddings", "model.embed_tokens"),
        ("^.norm", "model.norm"),
        ("^.output", "lm_head"),
        (f"{_LAYER}.attention.wq", f"{_THERE}.self_attn.q_proj", {
            "order": "rope:num_attention_heads"}),
        (f"{_LAYER}.attention.wk", f"{_THERE}.self_attn.k_proj", {
            "order": "rope:num_key_value_heads"}),
        (f"{_LAYER}.attention.wv", f"{_THERE}.self_attn.v_proj"),
        (f"{_LAYER}.attention.wo", f"{_THERE}.self_attn.o_proj"),
        (f"{_LAYER}.attention_norm", f"{_THERE}.input_layernorm"),
        (f"{_LAYER}.ffn_norm", f"{_THERE}.post_attention_layernorm"),
        (f"{_LAYER}.feed_forward.experts", f"{_THERE}.block_sparse_moe.experts"),
        (f"{_LAYER}.feed_forward.gate", f"{_THERE}.block_sparse_moe.gate"),
        (f"{_LAYER}.feed_forward.w1", f"{_THERE}.mlp.gate_proj"),
        (f"{_LAYER}.feed_forward.w2", f"{_THERE}.mlp.down_proj"),
        (f"{_LAYER}.feed_forward.w3", f"{_THERE}.mlp.up_proj"),
    )
)  # fmt: skip

#: Types of models that the rules are for; None is for a config.json that does not say, or is not
#: there. transformers has such names too, of other models, and knows itself what those are.
NATIVE_TYPES = (None, "", "llama", "mistral", "mixtral", "ministral")

_MARK = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.(experts\.\d+\.)?w[123])\.")
_OF_FACTORS = re.compile(rf"{_MARK.pattern}(lora_[AB])\.weight")

#: Fields of params.json that are counts, and what config.json calls them.
_COUNTS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
}  # fmt: skip


def is_native(names: Iterable[str]) -> bool:
    """Whether tensors of a model have the names of Meta's and Mistral's own files."""
    return any(_MARK.match(name) for name in names)


def is_native_adapter(names: Iterable[str]) -> bool:
    """The same of the factors of an adapter."""
    return any(_OF_FACTORS.fullmatch(name) for name in names)


class HubName(NamedTuple):
    """What a native name is in transformers' files, and the field of a config that says how many
    heads' rows lie in rotary pairs, "" for rows that lie as they do there."""

    name: str
    heads: str = ""


def named_on_hub(name: str) -> HubName:
    """The name in transformers' files of what is called `name` natively."""
    ((parts, attributes),) = apply_rules(NATIVE_RULES, tuple(name.split(".")))
    return HubName(".".join(parts), attributes.get("order", "").removeprefix("rope:"))


def config_of(params: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What params.json says of the model, in the words of config.json; `where` is the file.

    Raises BaseError for a field of a wrong type.
    """
    for field in _COUNTS:
        value = params.get(field)
        if value is not None and not (is_count(value) and value):
            raise BaseError(
                f"{where}: {field} is {value!a}, and should be a number above 0.",
                "Fetch the file again.",
            )
    config = {new: params[old] for old, new in _COUNTS.items() if params.get(old) is not None}
    if "num_attention_heads" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    kind = "mixtral" if params.get("moe") else "mistral" if "hidden_dim" in params else "llama"
    return {"model_type": kind, **config}


def native_config(
    config: dict[str, Any],
    params: dict[str, Any] | None,
    tensors: Mapping[str, TensorInfo],
    where: object,
) -> dict[str, Any]:
    """The config of a model with native names: what config.json says, if it is there, and what
    params.json does; `where` is the folder.

    Raises BaseError where the rows of a tensor are not those of the heads that it says: they would
    be taken for others.
    """
    found = (
        config_of(params, f"{where}/{PARAMS}") if params is not None else {"model_type": "llama"}
    )
    found |= {**config, NATIVE_NAMES: True}
    if "num_attention_heads" in found:
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
    heads = heads_of(found)
    if heads is None:
        return found
    for name, info in tensors.items():
        field = named_on_hub(name).heads
        count = heads.kv if field == "num_key_value_heads" else heads.query
        if field and info.shape[:1] != (count * heads.size,):
            rows = info.shape[0] if info.shape else 1
            raise BaseError(
                f"{where}: {name} has {counted(rows, 'row')}, and by the config it has "
                f"{counted(count, 'head')} of {counted(heads.size, 'row')}.",
                f"{PARAMS} or {CONFIG} is of another model; fetch the right one.",
            )
    return found
