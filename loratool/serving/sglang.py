"""What SGLang 0.5.23 takes, by its source."""

from __future__ import annotations

from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

_LORA = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py"
_CONFIG = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora_config.py"
_MANAGER = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora_manager.py"
_POOL = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/mem_pool.py"
_SCALES = "https://github.com/sgl-project/sglang/issues/40835"

#: Words that target_modules may be in place of a list.
_WORDS = ("all", "all-linear")


def _over_the_limit(t: Traits, setting: Setting) -> str:
    if setting.max_rank is None or t.rank <= setting.max_rank:
        return ""
    return f"rank {t.rank} is above --max-lora-rank {setting.max_rank}"


def _ranks(t: Traits, setting: Setting) -> str:
    others = [rank for rank in t.ranks if rank != t.rank]
    found = f"modules have rank {', '.join(map(str, others))}, and buffers the config's r {t.rank}"
    return f"{found}: an assertion fails" if others else ""


def _scales(t: Traits, setting: Setting) -> str:
    found = t.wrong_scales(lambda module: t.alpha / t.rank)
    return f"{found} (use_rslora and patterns are not read)" if found else ""


def _dora(t: Traits, setting: Setting) -> str:
    return "use_dora is refused" if t.has_dora else ""


def _tokens(t: Traits, setting: Setting) -> str:
    size = setting.vocabulary
    beyond = [n for n in t.added_tokens if size is not None and n >= size]
    return f"added_tokens.json has ids from the vocabulary's size {size} on" if beyond else ""


def _maybe_tokens(t: Traits, setting: Setting) -> str:
    if not t.added_tokens or setting.vocabulary:
        return ""
    return "the ids of added_tokens.json are below the base's vocabulary (--base checks that)"


def _targets(t: Traits, setting: Setting) -> str:
    if not isinstance(t.targets, str) or t.targets in _WORDS:
        return ""
    return "target_modules must be a list, all or all-linear, and is a regular expression"


def _norms(t: Traits, setting: Setting) -> str:
    held = t.held("norms", "others")
    return f"{held} match no target module: the load raises" if held else ""


def _heads(t: Traits, setting: Setting) -> str:
    held = t.held("heads", "beside")
    return f"{held} is skipped, with a warning at most" if held else ""


def _unlisted(t: Traits, setting: Setting) -> str:
    named = t.targets or []
    if isinstance(named, str):  # all of them, or refused
        return ""
    ends = {str(name).rpartition(".")[2] for name in named}
    apart = [p for p in (*t.on("embedding"), *t.head_factors) if p.rpartition(".")[2] not in ends]
    return f"{apart[0]} is loaded only if target_modules names it" if apart else ""


def _not_tried(t: Traits, setting: Setting) -> str:
    fields = ("use_bdlora", "use_qalora", "alora_invocation_tokens", "layer_replication",
              "fan_in_fan_out")  # fmt: skip
    found = ["lora_bias"] * t.has_factor_bias + ["bias"] * bool(t.trains_biases)
    found += ["token rows"] * bool(t.token_rows) + ["saved embeddings"] * bool(t.held("tokens"))
    found += [field for field in fields if t.sets(field)]
    return f"its source does not say what becomes of {', '.join(found)}" if found else ""


def _base_changed(t: Traits, setting: Setting) -> str:
    return f"{t.changed_base} took something off the base, which is not taken off here" * bool(
        t.changed_base
    )


def _experts(t: Traits, setting: Setting) -> str:
    if not (t.on("experts") or t.one_expert_each):
        return ""
    return "no adapter with experts in the other form (stacks, or apart) is in the server"


SGLANG = ServingProgram(
    "sglang", "SGLang", "0.5.23",
    (
        ServingRule("refused", "rank", _over_the_limit, "resize", _MANAGER),
        ServingRule("refused", "ranks differ", _ranks, "resize", _POOL),
        ServingRule("differs", "wrong scale", _scales, "resize", _SCALES),
        ServingRule("refused", "DoRA", _dora, "merge", _CONFIG),
        ServingRule("refused", "added tokens", _tokens, "merge", _MANAGER),
        ServingRule("refused", "target_modules", _targets, "resize", _MANAGER),
        ServingRule("refused", "saved whole", _norms, "merge", _LORA),
        ServingRule("differs", "saved whole", _heads, "merge", _LORA),
        ServingRule("differs", "embedding or head", _unlisted, "merge", _LORA),
        ServingRule("unknown", "variant", _not_tried, "merge", _CONFIG),
        ServingRule("differs", "initialisation", _base_changed, "merge", _CONFIG),
        ServingRule("loads", "added tokens", _maybe_tokens, source=_MANAGER),
        ServingRule("loads", "experts", _experts, source=_POOL),
    ),
    entries=("adapter_model.safetensors", "adapter_model.bin"),
    source=_LORA,
)  # fmt: skip
