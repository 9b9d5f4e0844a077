"""PEFT: adapter_config.json beside adapter_model.safetensors, keys by module path."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects.dialect import Entry, Evidence, Recipe, WritableDialect
from loratool.adapters.dialects.hand.names import is_hand_written
from loratool.adapters.dialects.multiplicative import multiply
from loratool.adapters.dialects.peft import names, targets
from loratool.adapters.dialects.peft.config import (
    check_config,
    init_that_changed,
    joined_config,
    layer_ranges,
    name_list,
)
from loratool.adapters.dialects.peft.drafting import peft_draft
from loratool.adapters.dialects.peft.keys import fill_adapter
from loratool.adapters.dialects.peft.types import METHODS
from loratool.adapters.dialects.peft.types.method import PeftMethod
from loratool.adapters.dialects.peft.types.reading import fill_typed
from loratool.adapters.dialects.peft.wrappers import registered
from loratool.adapters.dialects.writing import Asked, Draft, Writer
from loratool.adapters.factors import ModuleShape
from loratool.adapters.recognise import is_foreign
from loratool.adapters.told import refuse_contradictions
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import CLASSIFIERS
from loratool.models.layouts.native import is_native_adapter
from loratool.models.tasks import CLASSIFYING
from loratool.storage.fields import value_text

_FACTOR = re.compile(r".*\.(lora_[AB]\..+|lora_embedding_[AB](\..+)?)$")


@dataclass(frozen=True)
class Peft(WritableDialect, Writer):
    """LoRA with all its variants, and trained token rows, as PEFT saves them."""

    name: str = "peft"

    def claims(self, evidence: Evidence) -> str | None:
        if evidence.top in ("tensor", "list", "tuple"):
            return None
        if is_hand_written(evidence):
            return None
        tensors = evidence.tensors
        kind = str(evidence.config.get("peft_type") or "LORA").upper()
        if kind == "TRAINABLE_TOKENS":
            return "PEFT trainable tokens"
        if kind in METHODS:
            return f"a PEFT {METHODS[kind].words} adapter"
        lora = any(_FACTOR.match(name) or "trainable_tokens_delta" in name for name in tensors)
        if kind != "LORA" or not lora or is_foreign(tensors) or names.is_of_tinker(tensors):
            return None
        other = is_native_adapter(tensors) and not evidence.config
        return None if other else "a PEFT LoRA adapter"

    def check(self, config: dict[str, Any], where: object) -> None:
        check_config(config, where)
        method = _method(config)
        if method is not None:
            method.check(config, where)

    def declared(self, config: dict[str, Any]) -> Declared:
        return _declared(config)

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        wrapped = names.note_wrappers(adapter.tensors)
        if wrapped:
            adapter.notices += wrapped
            adapter.proper_keys = names.proper_keys(adapter.tensors)
        method = _method(adapter.config)
        if method is None:
            fill_adapter(adapter)
        else:
            fill_typed(adapter, method, base)
        ranks = {path: module.rank for path, module in adapter.modules.items()}
        told = replace(adapter.told, kind=None)
        refuse_contradictions(told, "factors of PEFT", "BA", ranks)
        if adapter.told.kind == "multiplicative":
            multiply(adapter, base)

    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        return peft_draft(adapter, asked)

    def factor_entries(self, outline: ModuleShape, rank: int) -> tuple[Entry, Entry]:
        return names.factor_shapes(outline, rank)

    def bias_key(self, path: str) -> str:
        return names.bias_key(path)

    def magnitude_key(self, path: str) -> str:
        return names.magnitude_key(path)

    def saved_key(self, name: str, key: str, adapted: Mapping[str, int]) -> str:
        return names.saved_key(name, key, adapted)

    def rows_key(self, key: str) -> str:
        return names.rows_key(key)

    def config(self, recipe: Recipe) -> dict[str, Any]:
        return joined_config(recipe) if recipe.sources else targets.extracted_config(recipe)

    def saved_unit(self, path: str) -> str:
        return targets.saved_unit(path)

    def saved_modules(
        self, saved: Iterable[str], modules: Collection[str], adapted: Collection[str]
    ) -> list[str]:
        return targets.saved_modules(saved, modules, adapted)

    def registered(self, names: Collection[str]) -> Sequence[str] | None:
        return registered(names)


def _method(config: dict[str, Any]) -> PeftMethod | None:
    """The type that a config says, if it is one beside LoRA that is read."""
    kind = config.get("peft_type")
    return METHODS.get(kind.upper()) if isinstance(kind, str) else None


def _declared(config: dict[str, Any]) -> Declared:
    mapping = config.get("auto_mapping") or {}
    task = config.get("task_type") or None
    saved = name_list(config, "modules_to_save")
    return Declared(
        peft_type=config.get("peft_type") or None,
        base_name=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        task=task,
        model_class=mapping.get("base_model_class") or "",
        model_library=mapping.get("parent_library") or "",
        saved_modules=tuple(saved),
        heads=frozenset(saved) | frozenset(CLASSIFIERS if task in CLASSIFYING else ()),
        transposes=bool(config.get("fan_in_fan_out")),
        ties_head=bool(config.get("ensure_weight_tying")),
        changed_base=init_that_changed(config),
        layer_ranges=layer_ranges(config),
        library="peft" if config.get("peft_type") else "",
        settings=tuple(_settings(config)),
    )


def _settings(config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What the config says, for people."""
    if not config:
        return
    method = _method(config)
    shown = [field for field in method.shown if field in config] if method else []
    if shown:
        yield "configured", ", ".join(f"{name} {value_text(config[name])}" for name in shown)
    # LoRA's are 8 where the config leaves them out; other kinds of adapters may have none.
    usual = {"r": 8, "lora_alpha": 8} if (config.get("peft_type") or "LORA") == "LORA" else {}
    said = {"r": "r", "lora_alpha": "alpha"}
    values = usual | config
    flags = [f"{word} {values[field]}" for field, word in said.items() if field in values]
    flags += [k for k in ("use_rslora", "use_dora", "lora_bias") if config.get(k)]
    flags += [f for f in ("rank_pattern", "alpha_pattern") if config.get(f)]
    if flags and method is None:
        yield "configured", ", ".join(flags)
    chosen = config.get("target_modules")
    parameters = config.get("target_parameters") or []
    modules = chosen if isinstance(chosen, list) else [str(chosen)]
    if parameters and not chosen:
        modules = []
    yield "targets", ", ".join([*sorted(map(str, modules)), *sorted(parameters)])
