"""What exllamav3 1.6.5 takes, by the source in its wheel."""

from __future__ import annotations

from loratool.serving.pairs_only import ignored_beside_pairs, on_base_as_published
from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

#: There is no page to link to: read in the wheel of that version.
_LORA = "exllamav3 1.6.5, model/lora.py"


def _scales(t: Traits, setting: Setting) -> str:
    found = t.wrong_scales(lambda module: t.alpha / t.root_or_rank)
    return f"{found} (patterns are not read)" if found else ""


def _turned(t: Traits, setting: Setting) -> str:
    return "fan_in_fan_out is refused" if t.sets("fan_in_fan_out") else ""


def _not_tried(t: Traits, setting: Setting) -> str:
    fields = ("use_bdlora", "use_qalora", "alora_invocation_tokens")
    found = [field for field in fields if t.sets(field)]
    return f"its source does not say what becomes of {', '.join(found)}" if found else ""


EXLLAMA = ServingProgram(
    "exllama", "exllamav3", "1.6.5",
    (
        ServingRule("differs", "wrong scale", _scales, "resize", _LORA),
        ServingRule("refused", "fan_in_fan_out", _turned, "merge", _LORA),
        ServingRule("differs", "parts ignored", ignored_beside_pairs, "merge", _LORA),
        ServingRule("differs", "initialisation", on_base_as_published, "merge", _LORA),
        ServingRule("unknown", "variant", _not_tried, "merge", _LORA),
    ),
    entries=("adapter_model.safetensors",), source=_LORA,
)  # fmt: skip
