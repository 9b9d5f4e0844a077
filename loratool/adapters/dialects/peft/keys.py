"""PEFT adapters on disk: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

A key is `base_model.model.` + module path + leaf, and the leaf says what the tensor is. Training
frameworks add prefixes (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`) and raw state dicts keep
the adapter's name (`.lora_A.default.weight`); all of that is taken off here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.config import (
    block_counts,
    config_notices,
    rank_and_scale,
)
from loratool.adapters.dialects.peft.expectations import note_expectations
from loratool.adapters.dialects.peft.names import plain_path
from loratool.adapters.dialects.peft.parameters import BareParameters, layout_notices
from loratool.adapters.dialects.peft.whole import (
    claim,
    note_lost_originals,
    note_several,
    place_saved_or_rows,
    place_whole,
)
from loratool.adapters.dialects.peft.wrappers import WrappedPair
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
)
from loratool.adapters.factors import Kind, LowRank
from loratool.adapters.told import Scaling, scaling
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo

_LEAVES = [
    ("factor", re.compile(r"(?P<path>.+)\.lora_(?P<side>A|B)(\.(?P<name>[^.]+))?\.weight")),
    ("bias", re.compile(r"(?P<path>.+)\.lora_B(\.(?P<name>[^.]+))?\.bias")),
    ("embedding", re.compile(r"(?P<path>.+)\.lora_embedding_(?P<side>A|B)(\.(?P<name>[^.]+))?")),
    ("magnitude", re.compile(
        r"(?P<path>.+)\.lora_magnitude_vector(\.(?P<name>(?!weight)[^.]+))?(\.weight)?")),
    # Training-time state of VeLoRA and MonteCLoRA; their forward pass in eval mode is plain LoRA.
    ("inert", re.compile(r"(?P<path>.+)\.lora_(velora_embed|monteclora_sampler)\b.*")),
]  # fmt: skip


@dataclass
class _Parts:
    """The tensors found for one module path."""

    #: By slot: "A", "B", "bias", "magnitude".
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    embedding: bool = False


def fill_adapter(adapter: Adapter) -> None:
    """Sort the tensors of a PEFT LoRA adapter into modules, replaced tensors and token rows.

    Fills `adapter` in place. Nothing is refused here: what cannot be merged becomes a notice with
    `refused` set, so that `inspect` can still show everything else.
    """
    parts: dict[str, _Parts] = defaultdict(_Parts)
    names: set[str] = set()
    for key, info in adapter.tensors.items():
        _place(adapter, key, info, parts, names)
    note_several(adapter, names)
    if adapter.config:
        adapter.notices += config_notices(adapter.config)
        adapter.notices += layout_notices(adapter.config.get("lora_B_layout") or "")
    elif not adapter.told.says_scale:
        adapter.notices.append(
            Notice(
                "no-config",
                "There is no adapter_config.json beside the weights, so alpha and the scale are "
                "unknown. Put it there, or say --alpha (lora_alpha in the training script) or "
                "--scale.",
                str(adapter.weights),
                refused=True,
            )
        )
    note_lost_originals(adapter)
    halves = _build_modules(adapter, parts)
    refuse_empty(adapter)
    note_expectations(adapter, halves)


def _place(
    adapter: Adapter, key: str, info: TensorInfo, parts: dict[str, _Parts], names: set[str]
) -> None:
    path = plain_path(key)
    if place_saved_or_rows(adapter, key, path, info, names):
        return
    for leaf, pattern in _LEAVES:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        found = match.groupdict()
        if found.get("name"):
            names.add(found["name"])
        if leaf == "inert":
            adapter.inert.append(key)
            return
        module = parts[found["path"]]
        if leaf in ("factor", "embedding"):
            module.embedding = leaf == "embedding"
            leaf = found["side"]
        claim(adapter, module.tensors, leaf, info)
        return
    if "lora_" in path:
        adapter.unknown.append(key)
    else:
        place_whole(adapter, key, path, info)


def _build_modules(adapter: Adapter, parts: dict[str, _Parts]) -> set[str]:
    """Fill `modules`. Returns the paths that have only a part of a pair."""
    # In the fused layout of enable_lora, A holds several factors and its rows are not the rank.
    fused = bool(adapter.config.get("enable_lora"))
    resolve = rank_and_scale(adapter.config, adapter.told) if adapter.config and not fused else None
    bare = BareParameters(adapter, {
        path: WrappedPair(found.tensors["A"], found.tensors["B"])
        for path, found in parts.items()
        if resolve and not found.embedding and {"A", "B"} <= found.tensors.keys()
    })  # fmt: skip
    halves: dict[str, list[str]] = {}
    wrong_ranks = []
    for path, found in parts.items():
        tensors = found.tensors
        if "A" not in tensors or "B" not in tensors:
            stray = [t.name for t in tensors.values()]
            if stray:
                halves[path] = [plain_path(name).removeprefix(f"{path}.") for name in stray]
            continue
        if resolve and bare.take(path, resolve):
            # PEFT gives a parameter neither a bias nor a magnitude.
            more = tensors.keys() & {"bias", "magnitude"}
            adapter.unknown += [tensors[slot].name for slot in sorted(more)]
            continue
        plain, kind = _kind(path, found, parts)
        a, b = tensors["A"], tensors["B"]
        # PEFT gives the output projection of an attention module the rank and alpha of the module.
        owner = plain.removesuffix(".out_proj") if kind == "attention-out" else plain
        scaled = Scaling()
        if resolve is not None:
            rank, scaled = resolve(owner)
            one_rank = len(b.shape) < 2 or a.shape[:1] == b.shape[1:2]  # else they make no product
            if len(a.shape) > 1 and a.shape[0] not in (0, rank) and one_rank:
                wrong_ranks.append(f"{plain}: the config gives {rank}, lora_A has {a.shape[0]}")
        elif not adapter.config and a.shape and a.shape[0]:
            scaled = scaling(adapter.told, a.shape[0], where=plain)
        scale = scaled.scale
        if scale is not None and kind == "attention-out":
            scale *= 2
        if plain in adapter.modules:
            adapter.unknown += [a.name, b.name]
            continue
        blocks_a, blocks_b = block_counts(adapter.config, plain)
        adapter.modules[plain] = LowRank(
            plain, kind, a, b, scaled.alpha, scale,
            tensors.get("magnitude"), tensors.get("bias"), blocks_a, blocks_b, scaled.origin,
        )  # fmt: skip
    bare.finish()
    wrong_ranks += bare.troubles.pop("rank-mismatch", [])
    refuse_halves(adapter, halves, "lora_A and lora_B")
    refuse_modules(
        adapter, "rank-mismatch",
        "has another rank than the config gives; correct r or rank_pattern in it", wrong_ranks,
    )  # fmt: skip
    if not fused:  # which is refused by its config already
        refuse_shapes(adapter, bare.troubles)
    return set(halves)


def _kind(path: str, found: _Parts, parts: dict[str, _Parts]) -> tuple[str, Kind]:
    """The module path without `base_layer`, and what sort of layer it is."""
    if found.embedding:
        return path, "embedding"
    if path.endswith(".base_layer.out_proj"):
        return path.replace(".base_layer.out_proj", ".out_proj"), "attention-out"
    if f"{path}.base_layer.out_proj" in parts:
        return path, "attention-in"
    return path, "conv" if len(found.tensors["A"].shape) > 2 else "linear"
