"""adapter_config.json: what each field means for the arithmetic, after PEFT 0.21.

Every field is in exactly one of three groups: it changes the arithmetic and is honoured here, it
has no effect on a merge, or it makes a merge from files impossible and is refused by name. A field
in none of them may change the arithmetic in a way nobody here knows, so it is refused too, unless
it is empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.dialects.peft.automaton import Effort
from loratool.adapters.dialects.peft.names import says_where
from loratool.adapters.dialects.peft.patterns import PathPatterns
from loratool.adapters.factors import ModuleShape
from loratool.adapters.told import Scaling, Told, scaling
from loratool.errors import AdapterError
from loratool.notices import Notice
from loratool.paths import dotted_ends
from loratool.storage.fields import (
    ABSENT,
    COUNTS,
    FLAG,
    NAMES,
    NUMBER,
    TABLE,
    TEXT,
    FieldType,
    check_fields,
    list_of,
    mapping_to,
    value_text,
)
from loratool.storage.filenames import ADAPTER_CONFIG

#: Fields that are read by loratool.
HONOURED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora",
    "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
    "target_modules", "init_lora_weights", "ensure_weight_tying", "use_bdlora",
    "base_model_name_or_path", "task_type", "target_parameters", "lora_B_layout", "peft_version",
}  # fmt: skip

#: Fields that matter in training only, or say where the adapter came from.
HARMLESS = {
    "auto_mapping", "revision", "inference_mode", "exclude_modules",
    "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "monteclora_config", "qalora_group_size", "runtime_config", "merge_weights",
}  # fmt: skip

#: Fields that, when set, make `W + scale·B·A` the wrong formula.
REFUSED = {
    "layer_replication": "it was trained on a model whose layers are copied; --replicate-layers "
    "writes that model",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens; no single weight "
    "does the same",
    "arrow_config": "Arrow routes each token among several adapters; no single weight does that",
    "use_qalora": "QALoRA pools its inputs by quantisation group and has no merged form",
    "kasa_config": "KaSA first cuts the smallest singular values off the base weight",
    "enable_lora": "the fused layout of PEFT 0.1–0.2 (MergedLinear) is not readable; load and "
    "save it with PEFT 0.2",
}

#: Initialisations that also changed the base weights, so that the base on disk is not the one the
#: adapter belongs to.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Those of them that follow from the base alone: PEFT makes them again when it loads an adapter.
_REPEATABLE = ("pissa", "olora")


_TEXT, _FLAG, _TABLE = TEXT | ABSENT, FLAG | ABSENT, TABLE | ABSENT
_SOME_NAMES = NAMES | TEXT | ABSENT
_NUMBERS = mapping_to(NUMBER, "a table of numbers") | ABSENT
_OFF = FieldType("false", lambda v: v is False)
_BIASES = ("none", "all", "lora_only")
_ABOVE_ZERO = FieldType("a whole number above zero", lambda v: type(v) is int and v > 0)
_RANGES = list_of(
    FieldType(
        "a range of layers",
        lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int for n in v)
        and 0 <= v[0] < v[1],
    ),
    "a list of ranges [start, end) of layers",
)  # fmt: skip

#: What is read of the config of any kind of adapter, and its types.
_DECLARED = {
    "peft_type": _TEXT, "task_type": _TEXT, "base_model_name_or_path": _TEXT, "revision": _TEXT,
    "auto_mapping": _TABLE, "modules_to_save": _SOME_NAMES, "fan_in_fan_out": _FLAG,
    "ensure_weight_tying": _FLAG,
}  # fmt: skip
#: What is read of LoRA's beside it.
_OF_LORA = {
    "r": NUMBER, "lora_alpha": NUMBER, "rank_pattern": _NUMBERS, "alpha_pattern": _NUMBERS,
    "use_rslora": _FLAG, "use_dora": _FLAG, "lora_bias": _FLAG, "target_modules": _SOME_NAMES,
    "init_lora_weights": _TEXT | FLAG, "target_parameters": NAMES | ABSENT,
    "lora_B_layout": _TEXT, "peft_version": _TEXT,
    "bias": FieldType(f"one of {', '.join(_BIASES)}", lambda v: v in (None, *_BIASES)),
    "trainable_token_indices": COUNTS | mapping_to(COUNTS, "a table of such lists") | ABSENT,
    "use_bdlora": TABLE | ABSENT | _OFF, "layer_replication": _RANGES | ABSENT | _OFF,
}  # fmt: skip
_OF_BDLORA = {
    "nblocks": _ABOVE_ZERO, "target_modules_bd_a": _SOME_NAMES, "target_modules_bd_b": _SOME_NAMES,
}  # fmt: skip


def check_config(config: dict[str, Any], where: object) -> None:
    """Raise AdapterError for a field that is read and has another type than PEFT gives it.

    PEFT itself takes "false" for true and 8.0 for no rank at all; what a user means by a value of
    the wrong type cannot be known.
    """
    check_fields(config, _DECLARED, where, AdapterError)
    classes = {"base_model_class": _TEXT, "parent_library": _TEXT}
    check_fields(config.get("auto_mapping") or {}, classes, f"{where}, auto_mapping", AdapterError)
    kind = (config.get("peft_type") or "LORA").upper()
    if kind == "TRAINABLE_TOKENS":
        check_fields(config, {"token_indices": COUNTS | ABSENT}, where, AdapterError)
    if kind in ("LORA", "ADALORA"):
        # An AdaLoRA's rank_pattern says which directions are left of each module.
        of_lora = _OF_LORA if kind == "LORA" else _OF_LORA | {"rank_pattern": TABLE | ABSENT}
        check_fields(config, of_lora, where, AdapterError)
        settings = config.get("use_bdlora") or {}
        check_fields(settings, _OF_BDLORA, f"{where}, use_bdlora", AdapterError)


def config_notices(config: dict[str, Any]) -> list[Notice]:
    """What in a LoRA config stands in the way of a merge, or is not known."""
    where = ADAPTER_CONFIG
    notices = []
    known = HONOURED | HARMLESS | REFUSED.keys()
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        known |= {"token_indices", "init_weights"}
    for field, reason in REFUSED.items():
        if config.get(field):
            notices.append(Notice(_code(field), f"{field} is set: {reason}.", where, refused=True))
    notices += _init_notices(config, where)
    if config.get("use_bdlora") and config.get("use_dora"):
        notices.append(
            Notice("bdlora-dora", "use_bdlora with use_dora has no meaning in PEFT.", where, True)
        )
    return [*notices, *unknown_fields(config, known)]


def unknown_fields(config: dict[str, Any], known: Collection[str]) -> list[Notice]:
    """Refusals of what a config holds beside the `known` fields, if it is not empty."""
    return [
        Notice(
            "unknown-config-field",
            f"{field}={value_text(config[field])} is not a field of PEFT 0.21 that loratool knows; "
            "it may change the arithmetic. Remove it if you know that it does not.",
            ADAPTER_CONFIG,
            refused=True,
        )
        for field in sorted(config.keys() - set(known))
        if config[field] not in (None, False, "", [], {})
    ]


def _init_notices(config: dict[str, Any], where: str) -> Iterator[Notice]:
    found = init_that_changed(config)
    given = f"init_lora_weights={config.get('init_lora_weights')!r} also changed the base weights"
    if found in _REPEATABLE:
        text = (
            f"{given}. A merge takes the same part off the base first: derived from the base, as "
            "PEFT does when it loads the adapter, or as --initial has it."
        )
        yield Notice("repeated-init", text, where)
    elif found:
        text = (
            f"{given}, so this adapter does not belong to the base as published, and nothing in it "
            "says by how much. Give the adapter as it was before training: --initial ADAPTER; or "
            "convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
        yield Notice("base-changing-init", text, where, refused=True)


def init_that_changed(config: dict[str, Any]) -> str:
    """The initialisation that also changed the base weights, in small letters; "" for others."""
    init = config.get("init_lora_weights") if config.get("peft_type") != "ADALORA" else None
    lowered = init.lower() if isinstance(init, str) else ""
    return lowered if lowered.startswith(_BASE_CHANGING) else ""


def layer_ranges(config: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The layers that the model was made of, as ranges [start, end) of those of the base."""
    return tuple((start, end) for start, end in config.get("layer_replication") or ())


def _code(field: str) -> str:
    return field.replace("_", "-")


def rank_and_scale(
    config: dict[str, Any], told: Told, alpha_field: str = "lora_alpha"
) -> Callable[[str], tuple[int, Scaling]]:
    """A function from module path to rank and scale, as config and user say.

    The patterns follow PEFT 0.15 and later (`get_pattern_key`): rank and alpha are looked up
    independently; a key is a regular expression that must match the whole path or a suffix of it
    that starts after a dot; the first matching key in file order wins.
    Source: peft/utils/other.py, peft/tuners/lora/layer.py (`scaling`).
    """
    effort = Effort()
    ranks = PathPatterns(config.get("rank_pattern") or {}, "rank_pattern", effort)
    alphas = PathPatterns(config.get("alpha_pattern") or {}, "alpha_pattern", effort)
    root = config.get("use_rslora")

    def resolve(path: str) -> tuple[int, Scaling]:
        rank = ranks.first(path, config.get("r", 8))
        alpha = alphas.first(path, config.get(alpha_field, 8))
        if rank < 1 or rank != int(rank):
            raise AdapterError(
                f"adapter_config.json: the rank of {path} is {rank}; it must be a whole number "
                "above zero.",
                "Correct r or rank_pattern.",
            )
        divisor = math.sqrt(rank) if root else rank
        return int(rank), scaling(told, divisor, alpha=alpha, where=path)

    return resolve


def name_list(config: dict[str, Any], field: str) -> list[str]:
    """The names in a field; [] where there is none. One that stands alone is one."""
    value: str | list[str] = config.get(field) or []
    return [value] if isinstance(value, str) else value


def block_counts(config: dict[str, Any], path: str) -> tuple[int, int]:
    """BD-LoRA: in how many diagonal blocks A and B of a module are stored (1 is not at all).

    A module is meant by a pattern that occurs anywhere in the last part of its path.
    Source: peft/tuners/lora/variants.py (`BdLoraLinearVariant.init`).
    """
    settings = config.get("use_bdlora")
    if not settings:
        return 1, 1
    leaf, count = path.rpartition(".")[2], settings.get("nblocks", 1)
    in_a = any(part in leaf for part in name_list(settings, "target_modules_bd_a"))
    in_b = any(part in leaf for part in name_list(settings, "target_modules_bd_b"))
    return count if in_a else 1, count if in_b else 1


def joined_config(recipe: Recipe) -> dict[str, Any]:
    """adapter_config.json of an adapter that is made of others.

    `alpha = r`, so that the scale is 1 for every module, also for programs that divide the alpha of
    the config by its r. The patterns are there only if not `uniform`.
    """
    configs = [a.config for a in recipe.sources]
    modules, ranks, saved = recipe.outlines, recipe.ranks, recipe.saved
    rank = max(ranks)
    has_bias = any(name.endswith(".bias") for name in saved)
    biases = {str(c.get("bias") or "none") for c in configs}
    patterns = {} if recipe.uniform else rank_pattern(modules, ranks)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _common(configs, "task_type"),
        "base_model_name_or_path": next(_values(configs, "base_model_name_or_path"), None),
        "revision": _common(configs, "revision"),
        "auto_mapping": _common(configs, "auto_mapping"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": _targets(configs, modules),
        "modules_to_save": _saved_modules(recipe, {m.path for m in modules}) or None,
        "bias": next((b for b in ("all", "lora_only") if has_bias and b in biases), "none"),
        "fan_in_fan_out": any(a.stores_turned for a in recipe.sources),
        "use_dora": recipe.scaled,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
    }
    if recipe.biased:
        config["lora_bias"] = True
    if any(c.get("ensure_weight_tying") for c in configs):
        config["ensure_weight_tying"] = True
    if recipe.rows:
        config["trainable_token_indices"] = {path: list(ids) for path, ids in recipe.rows.items()}
    return config


def _values(configs: Sequence[dict[str, Any]], field: str) -> Iterator[Any]:
    return (c[field] for c in configs if c.get(field))


def _common(configs: Sequence[dict[str, Any]], field: str) -> Any:
    """The value that all adapters have, else None."""
    found = {str(c.get(field)) for c in configs}
    return configs[0].get(field) if len(found) == 1 else None


def rank_pattern(modules: Sequence[ModuleShape], ranks: Sequence[int]) -> dict[str, int]:
    """Ranks other than the largest, by path.

    PEFT reads a key as the end of a path and takes the first that fits. So longer ones come first,
    and a path with the largest rank is listed too where a shorter key would fit it.
    """
    by_path = {m.rank_owner: rank for m, rank in zip(modules, ranks, strict=True)}
    lower = {path for path, rank in by_path.items() if rank != max(ranks)}
    listed = [path for path in by_path if not lower.isdisjoint(dotted_ends(path))]
    return {path: by_path[path] for path in sorted(listed, key=lambda path: (-len(path), path))}


def _targets(configs: Sequence[dict[str, Any]], modules: Sequence[ModuleShape]) -> list[str] | str:
    """What selects exactly these modules in the base.

    Ends of names, as people write them, if that is how all the adapters were made; full paths where
    one was made with a regular expression or for some layers only. PEFT takes a path for the end of
    longer ones too, which a name without a dot easily is, so such a list becomes an expression.
    """
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    plain = all(
        isinstance(c.get("target_modules"), list)
        and all(c.get(field) in (None, []) for field in narrowed)
        for c in configs
    )
    paths = sorted({m.rank_owner for m in modules})
    if plain:
        named = sorted({str(t) for c in configs for t in c["target_modules"]})
        used = [t for t in named if any(p == t or p.endswith(f".{t}") for p in paths)]
        if all(any(p == t or p.endswith(f".{t}") for t in used) for p in paths):
            return used
    return paths if all(map(says_where, paths)) else "|".join(map(re.escape, paths))


def _saved_modules(recipe: Recipe, adapted: set[str]) -> list[str]:
    """The names of saved modules that are in the file; an adapted module is not one of them."""
    named = {s for adapter in recipe.sources for s in adapter.declared.saved_modules}
    whole = [name for name in recipe.saved if name.rpartition(".")[0] not in adapted]
    return sorted(s for s in named if any(f".{s}." in f".{name}" for name in whole))
