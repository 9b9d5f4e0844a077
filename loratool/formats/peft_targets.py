"""adapter_config.json of an adapter that was not trained: which modules of a model it means.

PEFT takes an entry of target_modules or exclude_modules for the dotted end of a path, and one of
modules_to_save for any end. Short names, as people write them, are used where they mean exactly the
right modules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from loratool.adapter import Place
from loratool.formats.peft import AUTOMATIC_HEADS
from loratool.formats.peft_config import rank_pattern


def extracted_config(
    places: Sequence[Place],
    ranks: Sequence[int],
    saved: Sequence[str],
    modules: Collection[str],
    *,
    base_name: str | None,
    task_type: str | None,
    tied: bool,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The config of an adapter with these factors, whose scale is 1: `alpha = r`.

    `saved` are the names of the tensors saved whole, `modules` the paths of all modules of the
    model that hold tensors.
    """
    paths = [place.path for place in places]
    rank = max(ranks, default=1)
    patterns = rank_pattern(places, ranks) if len(set(ranks)) > 1 else {}
    biases = [n.rpartition(".")[0] for n in saved if n.endswith(".bias")]
    whole = saved_modules(saved, modules, set(paths))
    loose = [path for path in biases if path not in whole]
    targets, excluded = _targets(paths, modules)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "exclude_modules": excluded or None,
        "modules_to_save": _shortest(whole, modules) or None,
        "bias": "none" if not loose else "lora_only" if set(loose) <= set(paths) else "all",
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
    }
    if tied:
        config["ensure_weight_tying"] = True
    return config


def _targets(paths: Sequence[str], modules: Collection[str]) -> tuple[list[str] | str, list[str]]:
    """target_modules and exclude_modules that select `paths` among `modules`.

    Last parts of names with what they mean too many of excluded, or full paths; an expression
    where a path is the end of another one.
    """
    wanted = set(paths)
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    others = sorted(m for m in modules if m not in wanted and _ends(m, leaves))
    if len(others) <= len(paths) and not any(leaf.isdigit() for leaf in leaves):
        if not any(_ends(path, others) for path in paths):
            return leaves, others
    if not any(_ends(m, paths) for m in modules if m not in wanted):
        if all("." in path for path in paths):
            return sorted(paths), []
    return "|".join(map(re.escape, sorted(paths))), []


def _ends(path: str, names: Collection[str]) -> bool:
    """Whether a path is one of these names, or ends with one after a dot: PEFT's rule."""
    parts = path.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


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
        if path and path not in inner and path not in adapted and own != {"bias"}
    )


def saved_unit(path: str) -> str:
    """What PEFT saves where a module is saved: the module, or the classifier that it is part of."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.endswith(tuple(AUTOMATIC_HEADS)):
            return ".".join(parts[: i + 1])
    return path


def _shortest(paths: Sequence[str], modules: Collection[str]) -> list[str]:
    """`paths`, or the last parts of them where all that ends so is meant."""
    chosen = set(paths)
    named = set()
    for path in paths:
        leaf = path.rpartition(".")[2]
        meant = {m for m in modules if m.endswith(leaf)}
        named.add(leaf if not leaf.isdigit() and meant <= chosen else path)
    return sorted(named)
