"""adapter_config.json of an adapter that was not trained: which modules of a model it means.

PEFT takes an entry of target_modules or exclude_modules for the dotted end of a path, and one of
modules_to_save for any end. Short names, as people write them, are used where by these rules they
mean exactly the right modules. Sources: peft/tuners/tuners_utils.py (`check_target_module_exists`),
peft/utils/other.py (`_set_trainable`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.dialects.peft.config import rank_pattern
from loratool.adapters.dialects.peft.names import says_where
from loratool.adapters.factors import ModuleShape
from loratool.models.layouts.names import CLASSIFIERS
from loratool.paths import dotted_ends

_PREFIX = "base_model.model."


#: Ends of names that PEFT 0.21 takes for parts of experts where the model has stacks of them,
#: wherever they stand: it turns them into target_parameters, and loses the layers called so.
_REWRITTEN = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

#: Types of models for which PEFT 0.21 does that, whether the model has experts or not (by
#: transformers 5.24); where there are stacks it is taken for granted, for types to come too.
REWRITTEN_TYPES = frozenset({
    "minimax", "minimax_m2", "mixtral", "afmoe", "beam", "cohere2_moe", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
})  # fmt: skip

#: The version of PEFT by whose rules stacks are written. Where they are square only this tells
#: which way round the factors are.
_VERSION = "0.21.2"


def extracted_config(recipe: Recipe) -> dict[str, Any]:
    """The config of an adapter made of two models, whose scale is 1: `alpha = r`."""
    outlines, ranks, saved, modules = recipe.outlines, recipe.ranks, recipe.saved, recipe.modules
    rank = max(ranks, default=1)
    rewritten = bool(recipe.stacks) or recipe.model_type in REWRITTEN_TYPES
    by_weight = {o.path for o in outlines if rewritten and _is_rewritten(o)}
    named_so = [replace(o, path=f"{o.path}.weight") if o.path in by_weight else o for o in outlines]
    patterns = rank_pattern(named_so, ranks) if len(set(ranks)) > 1 else {}
    biases = [n.rpartition(".")[0] for n in saved if n.endswith(".bias")]
    every = {m[:i] for m in modules for i, letter in enumerate(m) if letter == "."} | {*modules}
    owners = {outline.owner for outline in outlines}
    whole = saved_modules(saved, modules, owners)
    loose = [path for path in biases if saved_unit(path) not in whole]
    named = _saved_names(whole, every, sorted(owners))
    paths = [o.path for o in outlines if o.kind != "experts" and o.path not in by_weight]
    free = {m for m in every if not _inside(m, named)}
    targets, excluded = _targets(paths, free, rewritten)
    parameters = _parameters(named_so, modules, recipe.stacks, by_weight)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": recipe.task_type,
        "base_model_name_or_path": recipe.base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "exclude_modules": excluded or None,
        "modules_to_save": named or None,
        "bias": "none" if not loose else "lora_only" if set(loose) <= set(paths) else "all",
        "fan_in_fan_out": recipe.transposes,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
    }
    if parameters:
        config |= {"target_parameters": parameters, "peft_version": _VERSION}
    if recipe.tied:
        config["ensure_weight_tying"] = True
    return config


def _is_rewritten(outline: ModuleShape) -> bool:
    # DeepSeek-V4's o_a_proj is a layer for groups, around which PEFT's sum has other shapes.
    by_weight = {*_REWRITTEN, "o_a_proj"}
    return outline.kind == "linear" and outline.path.rpartition(".")[2] in by_weight


def _parameters(
    outlines: Sequence[ModuleShape],
    modules: Collection[str],
    stacks: Collection[str],
    by_weight: Collection[str],
) -> list[str]:
    """target_parameters: stacks, and the weights of layers that go by them.

    As short as they can be without meaning another one: two parts of a name, or more.
    """
    wanted = {o.path for o in outlines if o.kind == "experts"} | {f"{p}.weight" for p in by_weight}
    others = ({*stacks} | {f"{module}.weight" for module in modules}) - wanted
    ambiguous = {end for name in others for end in dotted_ends(name)} if wanted else set()
    return sorted({
        next((end for end in [*dotted_ends(name)][-2::-1] if end not in ambiguous), name)
        for name in wanted
    })  # fmt: skip


def _targets(
    paths: Sequence[str], modules: Collection[str], listed: bool
) -> tuple[list[str] | str, list[str]]:
    """target_modules and exclude_modules that select `paths` among `modules`.

    Last parts of names with what they mean too many of excluded, or full paths; an expression
    where a path is the end of another one. With `listed` that is so only if it cannot be helped:
    of an expression PEFT takes the last parts of all names where a model has stacks of experts.
    """
    if not paths:
        return [], []
    wanted = set(paths)
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    others = sorted(m for m in modules if m not in wanted and _ends(m, leaves))
    short = len(others) <= len(paths) and not any(leaf.isdigit() for leaf in leaves)
    if short and not any(_ends(path, others) for path in paths):
        # A name for one module says where that is: modules without tensors have names too.
        counts = Counter(path.rpartition(".")[2] for path in paths)
        alone = {p.rpartition(".")[2]: p for p in paths if counts[p.rpartition(".")[2]] == 1}
        return sorted(alone.get(leaf, leaf) for leaf in leaves), others
    certain = listed or all(map(says_where, paths))
    if certain and not any(_ends(m, paths) for m in modules if m not in wanted):
        return sorted(paths), []
    return "|".join(map(re.escape, sorted(paths))), []


def _ends(path: str, names: Collection[str]) -> bool:
    """Whether a path is one of these names, or ends with one after a dot: PEFT's rule."""
    return any(end in names for end in dotted_ends(path))


def saved_modules(
    saved: Iterable[str], modules: Collection[str], adapted: Collection[str]
) -> list[str]:
    """The modules among those of `saved` that go into modules_to_save, by full path.

    A bias of a layer whose weight is not saved, and a bare parameter of a module with parts, is in
    the file under its own name, which PEFT loads too.
    """
    units = {saved_unit(m) for m in modules}
    inner = {m[:i] for m in units for i, letter in enumerate(m) if letter == "."}
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in saved:
        path, _, leaf = name.rpartition(".")
        unit = saved_unit(path)
        leaves[unit].add(leaf if unit == path else "")
    return sorted(
        path
        for path, own in leaves.items()
        if path
        and path not in inner
        and path not in adapted
        and own != {"bias"}
        and ".parametrizations." not in f".{path}."
    )


def saved_unit(path: str) -> str:
    """What PEFT saves where a module is saved: the module, or the classifier that it is part of."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.endswith(CLASSIFIERS):
            return ".".join(parts[: i + 1])
    return path


def _saved_names(units: Sequence[str], every: Collection[str], adapted: Sequence[str]) -> list[str]:
    """modules_to_save for these modules: last parts of names, full paths, or those with a prefix.

    An entry also keeps PEFT from adapting what is inside of a module called so.
    """
    chosen = set(units)
    named = set()
    for path in units:
        leaf = path.rpartition(".")[2]
        for name in (leaf, path, _PREFIX + path):
            meant = {m for m in every if (_PREFIX + m).endswith(name)}
            if meant <= chosen and not any(_inside(m, [name]) for m in adapted):
                named.add(name)
                break
    return sorted(named)


def _inside(path: str, names: Collection[str]) -> bool:
    """Whether a module is one of modules_to_save or in one, as PEFT sees it."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in names)
