"""What Ollama takes after ADAPTER, by its source: as llama.cpp, of two architectures."""

from __future__ import annotations

from loratool.serving import llamacpp
from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

_CONVERT = "https://github.com/ollama/ollama/blob/main/convert/convert.go"

#: Architectures of which it converts a folder itself.
_CONVERTED = ("llama", "gemma2")


def _architecture(t: Traits, setting: Setting) -> str:
    kind = setting.model_type
    if not kind or kind in _CONVERTED:
        return ""
    return f"it converts adapter folders of Llama and Gemma 2 only, and the base is {kind}"


def _maybe_architecture(t: Traits, setting: Setting) -> str:
    if setting.model_type or not t.is_peft:
        return ""
    return "the base is a Llama or a Gemma 2 (--base checks that)"


def _alpha(t: Traits, setting: Setting) -> str:
    return (
        ""
        if t.is_alpha_whole and t.alpha >= 0
        else f"lora_alpha {t.alpha:g} is read as a whole number"
    )


OLLAMA = ServingProgram(
    "ollama", "Ollama", "November 2026",
    (
        *llamacpp.RULES,
        ServingRule("refused", "architecture", _architecture, "convert", _CONVERT),
        ServingRule("refused", "alpha", _alpha, "resize", _CONVERT),
        ServingRule("loads", "architecture", _maybe_architecture, source=_CONVERT),
    ),
    ("peft", "gguf"), ("adapter_model.safetensors", "adapter_model.bin"), "gguf", _CONVERT,
)  # fmt: skip
