"""What llama.cpp calls modules, by architecture, and how it has their rows.

Names are those of gguf-py's tensor_mapping.py; what becomes of rows is in llama.cpp's conversion/,
and held against it: fixtures/dialects/check_gguf.py converts an adapter on every module of each of
these architectures with the real script and compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_GATED}
_OF_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
_SHARED = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
#: Of models whose head is always their embedding.
_TIED = {"token_embd": "model.embed_tokens"}


@dataclass(frozen=True)
class Architecture:
    """`name` is llama.cpp's, `types` are the model_types of transformers that it is.

    `modules` are those of a layer: llama.cpp's name, and the end of the Hub's, with `{}` for the
    number of an expert. With `paired` the rows of q and k lie in rotary pairs, as in Meta's files.
    """

    name: str
    types: tuple[str, ...]
    modules: Mapping[str, str]
    paired: bool = False
    layer: str = "model.layers"
    ends: Mapping[str, str] = field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output": "lm_head"}
    )


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", ("llama", "mistral", "mixtral"), {**_LLAMA, **_MIXTRAL}, True),
        Architecture("granite", ("granite",), _LLAMA, True),
        Architecture("olmo", ("olmo",), _LLAMA, True),
        Architecture("olmo2", ("olmo2", "olmo3"), _LLAMA),
        Architecture("qwen2", ("qwen2",), _LLAMA),
        Architecture("qwen3", ("qwen3",), _LLAMA),
        Architecture("qwen2moe", ("qwen2_moe",), {**_LLAMA, **_OF_EXPERTS, **_SHARED}),
        Architecture("qwen3moe", ("qwen3_moe",), {
            **_LLAMA, **_OF_EXPERTS, "ffn_gate_inp": "mlp.gate"}),
        Architecture("gemma", ("gemma",), _LLAMA, ends=_TIED),
        Architecture("gemma2", ("gemma2",), _LLAMA, ends=_TIED),
        Architecture("gemma3", ("gemma3", "gemma3_text"), _LLAMA, ends=_TIED),
        Architecture("smollm3", ("smollm3",), _LLAMA, True),
        Architecture("stablelm", ("stablelm",), _LLAMA),
        Architecture("starcoder2", ("starcoder2",), {
            **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        Architecture("command-r", ("cohere",), _LLAMA, ends=_TIED),
        Architecture("phi2", ("phi",), {
            **{own: end for own, end in _ATTENTION.items() if own != "attn_output"},
            "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}),
        Architecture("phi3", ("phi3",), {
            "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
        Architecture("gpt2", ("gpt2",), {
            "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj"},
            layer="transformer.h", ends={"token_embd": "transformer.wte", "output": "lm_head"}),
    )
}  # fmt: skip

_IN_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<module>\w+)")


@dataclass(frozen=True)
class Named:
    """A module by the Hub's name, `{}` in it for the number of an expert; `rotary` says whose rows
    lie in pairs: "query", "kv", or "" for none."""

    path: str
    rotary: str = ""

    @property
    def has_experts(self) -> bool:
        return "{}" in self.path


def named_there(tensor: str, architecture: Architecture) -> Named | None:
    """What llama.cpp calls `tensor`, without ".weight"; None for what is not known."""
    if tensor in architecture.ends:
        return Named(architecture.ends[tensor])
    found = _IN_LAYER.fullmatch(tensor)
    end = architecture.modules.get(found["module"]) if found else None
    if found is None or end is None:
        return None
    rotary = {"attn_q": "query", "attn_k": "kv"}.get(found["module"], "")
    path = f"{architecture.layer}.{found['layer']}.{end}"
    return Named(path, rotary if architecture.paired else "")


def named_here(path: str, architecture: Architecture) -> str | None:
    """llama.cpp's name of a module, by the Hub's; None for what it has no name for. Experts of a
    layer have one name together."""
    for own, there in architecture.ends.items():
        if there == path:
            return own
    found = re.fullmatch(rf"{re.escape(architecture.layer)}\.(\d+)\.(.+)", path)
    if found is None:
        return None
    end = re.sub(r"(?<=\.experts\.)\d+(?=\.)", "{}", found[2])
    names = (own for own, there in architecture.modules.items() if there == end)
    return next((f"blk.{found[1]}.{own}" for own in names), None)


def architecture_of(model_type: str) -> Architecture | None:
    """The architecture that a base of this model_type is to llama.cpp; None for an unknown one."""
    return next((one for one in ARCHITECTURES.values() if model_type in one.types), None)
