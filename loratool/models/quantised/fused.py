"""Modules that programs hold as one matrix, so that all of them are quantised or none is.

vLLM stacks q, k and v, gate and up, and all experts of a layer, and refuses a model where some of
these are quantised and others are not ("Detected some but not all shards of … are quantized").
Source: `packed_modules_mapping` of the classes in vllm/model_executor/models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

#: Last parts of modules that are one matrix, side by side in the same module.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("linear_1", "linear_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq_a", "wkv_a"),
    ("wq_a", "wkv"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("wk", "weights_proj"),
)
#: What vLLM calls the matrix of such modules.
_NAMES = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("query", "key", "value"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}
_EXPERTS = re.compile(r"(.*\bexperts)\..+")


def experts_of(weight: str) -> str | None:
    """The path of the experts that a weight is of; None for one that is of none."""
    found = _EXPERTS.fullmatch(weight)
    return found[1] if found else None


def with_fused(chosen: Collection[str], weights: Collection[str]) -> set[str]:
    """The chosen of these weights, and those that are one matrix with one of them."""
    units: dict[str, set[str]] = defaultdict(set)
    for name in weights:
        for unit in _units(name):
            units[unit].add(name)
    found: set[str] = set()
    waiting = [name for name in chosen if name in weights]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for unit in _units(name) for other in units[unit]]
    return found


def fused_paths(paths: Collection[str]) -> list[str]:
    """What these modules are called as the one matrix that some of them are in vLLM."""
    split = [path.rpartition(".") for path in paths]
    found = [
        f"{parent}{dot}{name}"
        for parent, dot, last in split
        for parts, name in _NAMES.items()
        if last in parts
    ]
    return list(dict.fromkeys(found))


def _units(name: str) -> list[str]:
    """The matrices that a weight is a part of."""
    experts = experts_of(name)
    if experts is not None:
        return [experts]
    path = name.removesuffix(".weight")
    parent, _, last = path.rpartition(".")
    return [f"{parent}.{'+'.join(parts)}" for parts in _FUSED if last in parts]
