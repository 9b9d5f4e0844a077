"""What litgpt's modules are called on the Hub, by family, and how q, k and v lie there.

The families are those of its own way back (https://github.com/Lightning-AI/litgpt,
scripts/convert_lit_checkpoint.py), told apart as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Each in a weight of its own; one above the other; or one above the other for each group of heads.
QkvOrder = Literal["apart", "joined", "grouped"]


@dataclass(frozen=True)
class Family:
    """`layer` is the path of a layer with its number as {}, `modules` what is in it by litgpt's
    names, where experts have {} for their number; `qkv` are the paths in a layer of q, k and v."""

    layer: str
    modules: Mapping[str, str]
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    order: QkvOrder = "apart"
    head: str = "lm_head"
    #: Modules that litgpt has two of where the Hub has one above the other.
    halves: Mapping[str, str] | None = None

    def path(self, layer: str, module: str) -> str:
        return f"{self.layer.format(layer)}.{module}"

    def named(self, layer: str, module: str) -> str | None:
        """The path on the Hub of a module of a layer; None for one that is not known."""
        expert = re.fullmatch(r"(mlp\.experts\.)(\d+)(\..+)", module)
        found = self.modules.get(f"{expert[1]}{{}}{expert[3]}" if expert else module)
        return found and self.path(layer, found.format(expert[2]) if expert else found)


def _dense(gate: str, up: str, down: str) -> dict[str, str]:
    return {"mlp.fc_1": gate, "mlp.fc_2": up, "mlp.proj": down}


_OUT = {"attn.proj": "self_attn.o_proj"}
_GATED = _dense("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FALCON_MLP = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
_EXPERT = "mlp.experts.{}."


def _experts(gate: str, where: str, names: tuple[str, str, str]) -> dict[str, str]:
    parts = zip(("fc_1", "fc_2", "proj"), names, strict=True)
    return {"mlp.gate": gate, **{f"{_EXPERT}{own}": f"{where}{name}" for own, name in parts}}


LLAMA = Family("model.layers.{}", {**_OUT, **_GATED})
MIXTRAL = Family("model.layers.{}", {
    **_OUT, **_experts("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
})  # fmt: skip
QWEN3_MOE = Family("model.layers.{}", {
    **_OUT, **_experts("mlp.gate", _EXPERT, ("gate_proj", "up_proj", "down_proj")),
})  # fmt: skip
PHI = Family("model.layers.{}", {
    "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2",
})  # fmt: skip
PHI3 = Family(
    "model.layers.{}", {**_OUT, "mlp.proj": "mlp.down_proj"}, ("self_attn.qkv_proj",), "joined",
    halves={"mlp.fc_1": "mlp.gate_up_proj", "mlp.fc_2": "mlp.gate_up_proj"},
)  # fmt: skip
NEOX = Family(
    "gpt_neox.layers.{}", {"attn.proj": "attention.dense", **_FALCON_MLP},
    ("attention.query_key_value",), "grouped", "embed_out",
)  # fmt: skip
FALCON = Family(
    "transformer.h.{}", {"attn.proj": "self_attention.dense", **_FALCON_MLP},
    ("self_attention.query_key_value",), "grouped",
)  # fmt: skip

#: By model_type of a base, where litgpt's own config is not there.
_BY_TYPE = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3", "qwen2",
                     "qwen3", "olmo", "olmo2", "stablelm"), LLAMA),
    "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "phi": PHI, "phi3": PHI3, "gpt_neox": NEOX,
    "falcon": FALCON,
}  # fmt: skip


def family_of(own: Mapping[str, Any], model_type: str) -> Family | None:
    """The family by litgpt's config of the model (`own`), or by the base's type where there is
    none."""
    if not own:
        return _BY_TYPE.get(model_type)
    name, mlp = own.get("name") or "", own.get("mlp_class_name") or "GptNeoxMLP"
    if "falcon" in name:
        return FALCON
    if name.lower().startswith("phi"):
        return PHI3 if name.lower().startswith(("phi-3", "phi-4")) else PHI
    if mlp == "LLaMAMoE":
        return QWEN3_MOE if name.lower().startswith("qwen3") else MIXTRAL
    return LLAMA if mlp in ("LLaMAMLP", "GemmaMLP") else NEOX
