"""Architectures whose activations exceed float16, though their weights fit into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratool.models.checkpoint import Checkpoint
from loratool.models.config import parts_within

_VLLM = "vLLM refuses float16 for it (_FLOAT16_NOT_SUPPORTED_MODELS in vllm/config/model.py)"
_T5 = "google-research/text-to-text-transfer-transformer#539, huggingface/transformers#5651, #23918"
_GEMMA4 = "unslothai/unsloth#5074, vllm-project/vllm#48231"
_GEMMA3 = "huggingface/transformers#36822"

#: Where it is written, by model_type; those of parts of composite models too.
_SOURCES = {
    "gemma2": _VLLM, "gemma3": _GEMMA3, "gemma3_text": _GEMMA3, "gemma3n": _GEMMA3,
    "gemma3n_text": _GEMMA3, "gemma4": _GEMMA4, "gemma4_text": _GEMMA4,
    "t5gemma": "its layers are those of gemma2", "t5gemma_module": "its layers are those of gemma2",
    "vaultgemma": "its layers are those of gemma2", "glm4": _VLLM, "plamo2": _VLLM,
    "t5": _T5, "mt5": _T5, "umt5": _T5, "longt5": _T5, "switch_transformers": _T5,
    "udop": "its layers are those of t5",
    "qwen2": "QwenLM/Qwen3#761, #868", "qwen2_vl": "huggingface/transformers#33294",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2#93",
    "gpt_oss": "microsoft/onnxruntime-genai#2444",
}  # fmt: skip


def float16_overflows(model: Checkpoint) -> tuple[str, str] | None:
    """The architecture in `model` whose activations exceed float16's 65504, and where that is
    written; None if none is known. Parts count like the whole."""
    return next(((kind, _SOURCES[kind]) for kind in _kinds(model.config) if kind in _SOURCES), None)


def _kinds(config: dict[str, Any]) -> Iterator[str]:
    """The model types in a config, its own first."""
    for inside in (config, *(part for _, part in parts_within(config))):
        yield inside.get("model_type") or ""
