"""What llama.cpp of October 2026 takes, by its source and runs: converter, then runtime."""

from __future__ import annotations

from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

_CONVERTER = "https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py"
_RUNTIME = "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp"
_SCALE = "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h"

#: What the converter writes of a tensor that is no factor; the runtime then skips it.
_PASSED = ("_layernorm", ".norm")


def _scales(t: Traits, setting: Setting) -> str:
    found = t.wrong_scales(lambda module: t.alpha / module.rank)
    return f"{found}: it takes lora_alpha / the rank of the tensor" if found else ""


def _is_passed(name: str) -> bool:
    return any(part in name for part in _PASSED)


def _norms(t: Traits, setting: Setting) -> str:
    norms = [name for name in t.saved.get("norms", []) if _is_passed(name)]
    found = f"{norms[0]} and {len(norms) - 1} more" if len(norms) > 1 else "".join(norms)
    return f"{found}: converted, and dropped at run time with no message" if found else ""


def _unexpected(t: Traits, setting: Setting) -> str:
    found = ["DoRA's magnitudes"] * t.has_dora + ["lora_bias"] * t.has_factor_bias
    found += [f"bias {t.trains_biases}"] * bool(t.trains_biases)
    held = t.held("tokens", "heads", "biases", "others")
    found += [held] * bool(held) + ["trained token rows"] * bool(t.token_rows)
    others = [name for name in t.saved.get("norms", []) if not _is_passed(name)]
    found += others[:1]
    return f"the converter ends at a tensor that is no factor: {', '.join(found)}" if found else ""


def _beside(t: Traits, setting: Setting) -> str:
    held = t.held("beside")
    return f"{held} lie in a file of their own, which is not read" if held else ""


def _tied(t: Traits, setting: Setting) -> str:
    found = t.head_factors if setting.is_tied else []
    return f"factors on {found[0]} of a base with a tied head: ValueError" if found else ""


def _maybe_tied(t: Traits, setting: Setting) -> str:
    if not t.head_factors or setting.is_tied is not None:
        return ""
    return "the base's head is not tied to its embedding (--base checks that)"


def _experts(t: Traits, setting: Setting) -> str:
    if not (t.on("experts") or t.one_expert_each):
        return ""
    return "experts are converted for architectures only whose converter merges them"


def _base_changed(t: Traits, setting: Setting) -> str:
    found = t.changed_base or "layer_replication" * t.sets("layer_replication")
    return f"{found}: it is applied to the base as published" if found else ""


def _not_tried(t: Traits, setting: Setting) -> str:
    found = [field for field in ("use_bdlora", "use_qalora") if t.sets(field)]
    return f"its source does not say what becomes of {', '.join(found)}" if found else ""


RULES = (
    ServingRule("differs", "wrong scale", _scales, "resize", _SCALE, ran=True),
    ServingRule("refused", "no factors", _unexpected, "merge", _CONVERTER, ran=True),
    ServingRule("differs", "norms dropped", _norms, "merge", _RUNTIME, ran=True),
    ServingRule("differs", "files beside it", _beside, "merge", _CONVERTER),
    ServingRule("refused", "tied head", _tied, "merge", _CONVERTER, ran=True),
    ServingRule("unknown", "experts", _experts, "merge", _CONVERTER),
    ServingRule("differs", "initialisation", _base_changed, "merge", _CONVERTER),
    ServingRule("unknown", "variant", _not_tried, "merge", _CONVERTER),
    ServingRule("loads", "head", _maybe_tied, source=_CONVERTER),
)

LLAMACPP = ServingProgram(
    "llamacpp", "llama.cpp", "October 2026", RULES, ("peft", "gguf"),
    ("adapter_model.safetensors", "adapter_model.bin"), "gguf", _CONVERTER,
)  # fmt: skip
