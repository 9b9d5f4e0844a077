"""What files have, and backwards transformers does not find: few rules, by model_type."""

from __future__ import annotations

from typing import Any

Rules = list[list[Any]]

_INTO_THINKER: Rules = [
    [f"^.{name}", f"thinker.{name}"] for name in ("audio_tower", "lm_head", "model", "visual")
]


def _single(kind: str, gate: list[Any], up: list[Any], down: dict[str, Any]) -> Rules:
    """Experts one by one, of models whose files and memory have stacks: some programs train them
    so (prime-rl, Unsloth's linear experts), and adapters then name them so."""
    both = "experts.gate_up_proj"
    return [
        ["experts.{e}.down_proj.weight", "experts.down_proj", *([down] if down else [])],
        ["experts.{e}.gate_proj.weight", both, {kind: gate}],
        ["experts.{e}.up_proj.weight", both, {kind: up}],
    ]


_ROWS = _single("rows", ["0", "1/2"], ["1/2", "1"], {})
#: Stacks [experts, in, out]: halves of the last axis, or gate and up in turns.
_COLUMNS = _single("columns", ["0", "1/2"], ["1/2", "1"], {"transposed": True})
_TURNS = _single("columns", ["0", "1", 2], ["0", "1", 2, 1], {"transposed": True})

#: Rules before those that were derived.
BEFORE: dict[str, Rules] = {
    # Published files have no `model.` in front, and what is anchored there does not come back.
    "deepseek_v4": [
        ["attn.kv_norm", "self_attn.kv_norm"],
        ["^.embed.weight", "model.embed_tokens.weight"],
        ["^.hc_head_base", "model.hc_head.hc_base"],
        ["^.hc_head_fn", "model.hc_head.hc_fn"],
        ["^.hc_head_scale", "model.hc_head.hc_scale"],
        ["^.layers", "model.layers"],
        ["^.norm", "model.norm"],
    ],
    "gpt_oss": _TURNS,
    **dict.fromkeys(("aria_text", "llama4", "llama4_text", "openai_privacy_filter"), _COLUMNS),
    **dict.fromkeys(("gemma4_text", "mistral4", "qwen3_vl_moe", "qwen3_vl_moe_text"), _ROWS),
    # Backwards only one of two names comes out.
    "hunyuan_vl": [["^.model.vit", "vit"]],
    # Adapters are made on the thinker alone, whose class has no such prefix.
    "qwen2_5_omni": _INTO_THINKER,
    "qwen3_omni_moe": _INTO_THINKER,
}

#: What is said beside a pattern, where transformers divides into equal parts and files do not.
INSTEAD: dict[str, dict[str, dict[str, Any]]] = {
    "molmo2_text": {
        "^.wte.embedding": {"rows": [0, 2]},
        "^.wte.new_embedding": {"rows": [1, 2]},
    },
}

#: Types that have the rules of another one, which transformers says by the name of a class.
ALIASES = {"mlcd": "clip_vision_model", "mlcd_vision_model": "clip_vision_model"}


def corrected(kind: str, rules: Rules) -> Rules:
    """The rules of a type, with what is here."""
    instead = INSTEAD.get(kind, {})
    changed = [[*rule[:2], instead[rule[0]]] if rule[0] in instead else rule for rule in rules]
    return [*BEFORE.get(kind, []), *changed]
