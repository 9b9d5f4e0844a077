"""What vLLM 0.33.0 takes, by its source and by runs of its check of configs and its reader."""

from __future__ import annotations

from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

_PEFT_HELPER = "https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py"
_CONFIG = "https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py"
_MODEL = "https://github.com/vllm-project/vllm/blob/main/vllm/lora/lora_model.py"

#: What --max-lora-rank may be, and what it is where nobody says.
RANK_SETTINGS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16
#: Initialisations by name that its check of configs lets pass.
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_NEEDED = ("r", "lora_alpha", "target_modules")


def rank_setting(rank: int) -> int | None:
    """The smallest --max-lora-rank that a rank fits; None where none is large enough."""
    return next((setting for setting in RANK_SETTINGS if setting >= rank), None)


def _over_the_limit(t: Traits, setting: Setting) -> str:
    limit = setting.max_rank or DEFAULT_RANK
    if t.largest_rank <= limit:
        return ""
    enough = rank_setting(t.largest_rank)
    started = f"it loads where the server is started with --max-lora-rank {enough}"
    return f"rank {t.largest_rank} is above max_lora_rank {limit}; " + (
        started if enough else f"{RANK_SETTINGS[-1]} is the largest setting"
    )


def _variants(t: Traits, setting: Setting) -> str:
    fields = {"use_dora": t.has_dora, "lora_bias": t.has_factor_bias, "bias": t.trains_biases}
    named = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    found = [field for field, is_set in fields.items() if is_set] + [f for f in named if t.sets(f)]
    return f"{', '.join(found)} of the config: not supported (ValueError)" * bool(found)


def _router(t: Traits, setting: Setting) -> str:
    return "arrow_config is not read: its factors would be added always" * t.sets("arrow_config")


def _init(t: Traits, setting: Setting) -> str:
    return f"init_lora_weights={t.init!r} is refused" * bool(t.init and t.init not in _INITS)


def _base_changed(t: Traits, setting: Setting) -> str:
    passes = t.init in _INITS and t.changed_base
    return (
        f"{t.changed_base} took something off the base, which is not taken off here"
        if passes
        else ""
    )


def _saved(t: Traits, setting: Setting) -> str:
    held = t.held("tokens", "norms", "biases", "others")
    return f"{held}; only a classifier or score may be" if held else ""


def _beside(t: Traits, setting: Setting) -> str:
    held = t.held("beside")
    return f"{held} lie in a file of their own, which is not read" if held else ""


def _rows(t: Traits, setting: Setting) -> str:
    return "trained token rows are tensors of an unknown name" if t.token_rows else ""


def _lookup(t: Traits, setting: Setting) -> str:
    found, size = t.on("embedding"), setting.vocabulary
    if not found:
        return ""
    columns = t.adapter.modules[found[0]].outline.shape[1]
    return f"lora_embedding_A has {columns} columns, the vocabulary {size}" * (columns != size)


def _wrong_lookup(t: Traits, setting: Setting) -> str:
    return _lookup(t, setting) if setting.vocabulary else ""


def _maybe_lookup(t: Traits, setting: Setting) -> str:
    if not t.on("embedding") or setting.vocabulary:
        return ""
    return "lora_embedding_A has exactly the vocabulary's columns (--base checks that)"


def _names(t: Traits, setting: Setting) -> str:
    names = t.odd_names
    return f"{names[0]} does not end as factors must (lora_A.weight)" if names else ""


def _missing(t: Traits, setting: Setting) -> str:
    missing = [field for field in _NEEDED if t.config and field not in t.config]
    return f"the config lacks {', '.join(missing)}" if missing else ""


def _stacks(t: Traits, setting: Setting) -> str:
    return "the model has is_3d_lora_weight, for experts in stacks" if t.on("experts") else ""


def _heads(t: Traits, setting: Setting) -> str:
    named = t.adapter.declared.saved_modules
    return f"modules_to_save names {len(named)} modules; one head is taken" * (len(named) > 1)


VLLM = ServingProgram(
    "vllm", "vLLM", "0.33.0",
    (
        ServingRule("refused", "rank", _over_the_limit, "resize", _CONFIG, ran=True),
        ServingRule("refused", "DoRA, biases or a variant", _variants, "merge", _PEFT_HELPER, True),
        ServingRule("refused", "initialisation", _init, "merge", _PEFT_HELPER, True),
        ServingRule("differs", "Arrow", _router, "", _PEFT_HELPER, ran=True),
        ServingRule("differs", "initialisation", _base_changed, "merge", _PEFT_HELPER),
        ServingRule("refused", "saved whole", _saved, "merge", _MODEL, ran=True),
        ServingRule("refused", "several heads", _heads, "merge", _PEFT_HELPER, True),
        ServingRule("differs", "files beside it", _beside, "merge", _MODEL),
        ServingRule("refused", "token rows", _rows, "merge", _MODEL, True),
        ServingRule("refused", "vocabulary", _wrong_lookup, "merge", _MODEL, True),
        ServingRule("refused", "names", _names, "resize", _MODEL, True),
        ServingRule("refused", "config", _missing, "resize", _PEFT_HELPER, True),
        ServingRule("loads", "vocabulary", _maybe_lookup, source=_MODEL),
        ServingRule("loads", "experts", _stacks, source=_MODEL),
    ),
    entries=("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    source=_PEFT_HELPER,
)  # fmt: skip
