"""What text-generation-inference took when it was archived: the rules of LoRAX, by its source."""

from __future__ import annotations

from dataclasses import replace

from loratool.serving import lorax
from loratool.serving.verdict import ServingProgram

_LORA = (
    "https://github.com/huggingface/text-generation-inference/blob/main/server/"
    "text_generation_server/adapters/lora.py"
)

TGI = ServingProgram(
    "tgi", "TGI", "March 2026",
    tuple(replace(rule, source=_LORA) for rule in lorax.RULES),
    entries=("adapter_model.safetensors",), source=_LORA,
)  # fmt: skip
