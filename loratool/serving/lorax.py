"""What LoRAX takes, by its source: ranks padded and stacked over layers, one scale for all."""

from __future__ import annotations

from loratool.serving.pairs_only import ignored_beside_pairs, on_base_as_published
from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting
from loratool.words import enumerated

_LORA = "https://github.com/predibase/lorax/blob/main/server/lorax_server/adapters/lora.py"
_PADDING = "https://github.com/predibase/lorax/blob/main/server/lorax_server/utils/sgmv.py"


def padded_rank(rank: int) -> int:
    """The rank that factors are filled up to: 8, and multiples of 16 above that."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _ranks(t: Traits, setting: Setting) -> str:
    kinds = t.unequal_ranks(padded_rank)
    found = f"{enumerated(kinds, 3)}: ranks that differ from layer to layer, also when padded"
    return f"{found}, are not stacked" if kinds else ""


def _scales(t: Traits, setting: Setting) -> str:
    found = t.wrong_scales(lambda module: t.alpha / t.root_or_rank)
    return f"{found} (patterns are not read)" if found else ""


def _gaps(t: Traits, setting: Setting) -> str:
    kinds = t.gaps(setting.layers)
    found = f"some layers have no factors for {enumerated(kinds, 3)}"
    return f"{found}: those of all layers are dropped" if kinds else ""


def _maybe_gaps(t: Traits, setting: Setting) -> str:
    if setting.layers or not t.sets("layers_to_transform"):
        return ""
    return "layers_to_transform names layers; whether these are all of the base, --base tells"


def _alpha(t: Traits, setting: Setting) -> str:
    return "" if t.is_alpha_whole else "lora_alpha is declared as a whole number"


def _not_tried(t: Traits, setting: Setting) -> str:
    fields = ("use_bdlora", "use_qalora", "alora_invocation_tokens")
    found = [field for field in fields if t.sets(field)]
    return f"its source does not say what becomes of {', '.join(found)}" if found else ""


def _head(t: Traits, setting: Setting) -> str:
    return "the server targets the head, else its factors are not read" if t.head_factors else ""


RULES = (
    ServingRule("refused", "ranks differ", _ranks, "resize", _PADDING),
    ServingRule("differs", "wrong scale", _scales, "resize", _LORA),
    ServingRule("differs", "parts ignored", ignored_beside_pairs, "merge", _LORA),
    ServingRule("differs", "layers without factors", _gaps, "merge", _LORA),
    ServingRule("unknown", "layers without factors", _maybe_gaps, "merge", _LORA),
    ServingRule("differs", "initialisation", on_base_as_published, "merge", _LORA),
    ServingRule("unknown", "alpha", _alpha, "resize", _LORA),
    ServingRule("unknown", "variant", _not_tried, "merge", _LORA),
    ServingRule("loads", "head", _head, source=_LORA),
)

LORAX = ServingProgram(
    "lorax", "LoRAX", "November 2026", RULES, entries=("adapter_model.safetensors",), source=_LORA
)
