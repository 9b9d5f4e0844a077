"""torchtune: `adapter_model.pt`, or `adapter_N.pt` before, by the names of its own decoder.

A [r, in] and B [out, r] lie as in PEFT, but rows of q and k, of magnitudes too, are in the order of
torchtune's weights, which for most families has rotary pairs side by side
(https://github.com/pytorch/torchtune, models/convert_weights.py and models/*/_convert_weights.py).
Its export for PEFT in the same folder re-orders B alone, and B also where the weights of a family
have the order of Hugging Face: with magnitudes, and for Qwen2, it is wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.layers import HEAD, alike, unknown_base
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.dialects.writing import Asked, Draft, Writer
from loratool.adapters.factors import LowRank
from loratool.adapters.told import refuse_contradictions, scaling
from loratool.errors import AdapterError, listed
from loratool.models.checkpoint import Checkpoint
from loratool.models.decoder import decoder_of
from loratool.models.heads import Heads, heads_of, pairs_apart, pairs_together
from loratool.notices import Notice
from loratool.storage.fields import ABSENT, COUNT, NUMBER, TEXT, check_fields
from loratool.storage.filenames import ADAPTER_CONFIG, CONFIG
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_sample

_LEAF = re.compile(r"(?P<path>.+)\.(?:(?P<half>lora_[ab])\.weight|magnitude)")
_FACTOR = re.compile(r".+\.lora_[ab]\.weight")

#: Where the modules of a layer are in Hugging Face's models.
_IN_LAYERS = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_OWN = {hub: own for own, hub in _IN_LAYERS.items()}
_LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<module>.+)")

#: By model_type: whether torchtune's weights of q and k have rotary pairs side by side.
_PAIRED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}

#: As older versions name it; newer ones take any name too (adapter_checkpoint).
WRITTEN_FILE = "adapter_0.pt"

#: What adapter_config.json says beside the file, and what torchtune cannot have made.
_FIELDS = {"r": COUNT | ABSENT, "lora_alpha": NUMBER | ABSENT,
           "base_model_name_or_path": TEXT | ABSENT}  # fmt: skip
_NOT_OURS = ("use_rslora", "rank_pattern", "alpha_pattern")


def hub_path(path: str) -> str | None:
    """The name that a module of torchtune's has on the Hub; None for one that is not known."""
    if path == "output":
        return "lm_head"
    found = _LAYER.fullmatch(path)
    module = found and _IN_LAYERS.get(found["module"])
    return f"model.layers.{found['number']}.{module}" if found and module else None


def own_path(path: str) -> str:
    """The reverse of `hub_path`, of a path that it gives."""
    if path == "lm_head":
        return "output"
    number, module = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()  # type: ignore[union-attr]
    return f"layers.{number}.{_OWN[module]}"


def is_original_of(tensors: Mapping[str, TensorInfo], exported: Mapping[str, TensorInfo]) -> bool:
    """Whether `exported` is what torchtune wrote for PEFT of the adapter with these tensors: it has
    all of A as it is."""
    halves = [(leaf, info) for key, info in tensors.items() if (leaf := _LEAF.fullmatch(key))]
    pairs = [
        (info, exported.get(f"base_model.model.{hub_path(leaf['path'])}.lora_A.weight"))
        for leaf, info in halves
        if leaf["half"] == "lora_a"
    ]
    return bool(pairs) and all(other and same_sample(info, other) for info, other in pairs)


@dataclass(frozen=True)
class Torchtune(Dialect, Writer):
    """LoRA and DoRA as torchtune's recipes save them."""

    name: str = "torchtune"
    needs_base: bool = True

    def claims(self, evidence: Evidence) -> str | None:
        named = evidence.top == "dict" and any(map(_FACTOR.fullmatch, evidence.tensors))
        return "a torchtune adapter" if named else None

    def check(self, config: dict[str, Any], where: object) -> None:
        check_fields(config, _FIELDS, where, AdapterError)

    def declared(self, config: dict[str, Any]) -> Declared:
        said = {"r": config.get("r"), "alpha": config.get("lora_alpha")}
        words = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        return Declared(
            base_name=config.get("base_model_name_or_path") or None,
            settings=(("configured", words),) if words else (),
        )

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        adapter.producer = "torchtune"
        found = _sorted(adapter)
        wrong_ranks = []
        config = adapter.config
        for name in _NOT_OURS:
            if config.get(name):
                text = f"{name} is set, which torchtune has not: the file is of another adapter."
                adapter.notices.append(Notice("unknown-config-field", text, ADAPTER_CONFIG, True))
        for path, parts in found.items():
            if not {"lora_a", "lora_b"} <= parts.keys():
                continue
            a, b = parts["lora_a"], parts["lora_b"]
            rank = a.shape[0] if a.shape else 0
            if rank and config.get("r") not in (None, rank):
                wrong_ranks.append(f"{path}: the config gives {config['r']}, A has {rank}")
            alpha = config.get("lora_alpha") if config.get("r") else None
            said = scaling(adapter.told, rank or 1, alpha=alpha, where=path)
            adapter.modules[path] = LowRank(
                path, "linear", a, b, said.alpha, said.scale, parts.get("magnitude"),
                scale_from=said.origin,
            )  # fmt: skip
        refuse_halves(
            adapter,
            {path: [*parts] for path, parts in found.items() if path not in adapter.modules},
            "lora_a and lora_b",
        )
        refuse_modules(
            adapter, "rank-mismatch", "has another rank than adapter_config.json gives", wrong_ranks
        )
        refuse_empty(adapter)
        refuse_shapes(adapter, {})
        refuse_unknown(adapter)
        refuse_without_scale(adapter)
        _order_rows(adapter, base)
        ranks = {path: module.rank for path, module in adapter.modules.items()}
        refuse_contradictions(adapter.told, "factors of torchtune", "BA", ranks)

    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        config = asked.base.config if asked.base is not None else {}
        kind, decoder = config.get("model_type"), decoder_of(config)
        if decoder is None or kind not in _PAIRED or decoder.heads.size % 2:
            raise AdapterError(
                "torchtune has rows of q and k in an order that depends on the base, and the same "
                f"modules in all its layers; known are bases of {', '.join(_PAIRED)}.",
                unknown_base(asked.base),
            )
        draft = Draft("torch", WRITTEN_FILE)
        if config.get("tie_word_embeddings") and HEAD in adapter.modules:
            draft.refuse(HEAD, "torchtune has the embedding for the head of this base")
            return draft
        made = alike(draft, adapter, asked, decoder, self.name, scaled=True)
        if made is None:
            return draft
        heads = {"q_proj": decoder.heads.query, "k_proj": decoder.heads.kv}
        for path, pair in made.pairs.items():
            count = heads.get(path.rpartition(".")[2]) if _PAIRED[kind] else None
            slots = {"lora_a.weight": pair.a, "lora_b.weight": pair.b, "magnitude": pair.magnitude}
            for slot, info in slots.items():
                if info is not None:
                    turned = count is not None and slot != "lora_a.weight"
                    draft.tensors[f"{own_path(path)}.{slot}"] = (
                        pairs_together(info, count) if turned and count else info
                    )
        draft.documents[ADAPTER_CONFIG] = {
            "r": made.rank, "lora_alpha": made.alpha, "peft_type": "LORA",
            "target_modules": [module.rpartition(".")[2] for module in made.modules],
            "base_model_name_or_path": adapter.declared.base_name,
        }  # fmt: skip
        return draft


def _sorted(adapter: Adapter) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each module by their slots; others are unknown."""
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for key, info in adapter.tensors.items():
        leaf = _LEAF.fullmatch(key)
        path = hub_path(leaf["path"]) if leaf else None
        if leaf and path:
            found[path][leaf["half"] or "magnitude"] = info
        else:
            adapter.unknown.append(key)
    return found


def _order_rows(adapter: Adapter, base: Checkpoint | None) -> None:
    """Bring rows of q and k into the order of Hugging Face."""
    config: Mapping[str, Any] = {}
    if base is not None:
        config = base.config
    elif adapter.folder.has(CONFIG):  # torchtune puts the base's beside the adapter
        config = adapter.folder.json(CONFIG)
    kind = config.get("model_type")
    ends = (".self_attn.q_proj", ".self_attn.k_proj")
    turned = [path for path in adapter.modules if path.endswith(ends)]
    if not kind:
        if turned:
            _refuse_order(adapter, turned, (
                "are in an order that depends on the heads of the base: say --base"
                if base is None else
                "are in an order that depends on the base's heads: put its config.json beside it"
            ))  # fmt: skip
    elif kind not in _PAIRED:
        text = (
            f"The base is of the kind {kind!r}, for which the order of torchtune's rows is not "
            f"known here; known are {', '.join(_PAIRED)}."
        )
        adapter.notices.append(Notice("row-order", text, str(adapter.weights), refused=True))
    elif _PAIRED[kind] and turned:
        heads = heads_of(config)
        if heads is None or heads.size % 2:
            _refuse_order(adapter, turned, "depend on the heads, which config.json does not say")
            return
        other = [path for path in turned if not _turn(adapter, path, heads)]
        if other:
            query, kv, _ = heads.rows
            _refuse_order(adapter, other, (
                f"are not as many as the config.json of the base says: {query} of q, {kv} of k"
            ))  # fmt: skip


def _turn(adapter: Adapter, path: str, heads: Heads) -> bool:
    """Re-order rows of q or k; False where there are not as many as heads have."""
    module = adapter.modules[path]
    assert isinstance(module, LowRank)
    is_query = path.endswith("q_proj")
    count = heads.query if is_query else heads.kv
    shapes = [t.shape for t in (module.b, module.magnitude) if t is not None]
    if any(shape[:1] != (count * heads.size,) for shape in shapes):
        return not module.is_sound  # which has been refused already
    magnitude = module.magnitude
    adapter.modules[path] = replace(
        module,
        b=pairs_apart(module.b, count),
        magnitude=pairs_apart(magnitude, count) if magnitude is not None else None,
    )
    return True


def _refuse_order(adapter: Adapter, paths: list[str], why: str) -> None:
    text = f"The rows of {len(paths)} modules {why}.\n{listed(paths)}"
    adapter.notices.append(Notice("row-order", text, paths[0], refused=True))
