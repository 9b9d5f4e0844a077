"""Adapters of Mistral's own code: `lora.safetensors` with native names, params.json beside it.

mistral-finetune (finetune/checkpointing.py) saves A `[r, in]` and B `[out, r]` as PEFT does, under
the names of `models.layouts.native`. The factor of the product is `scaling` itself, which stands in
the table `lora` of params.json (model/lora.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.rotary import RotaryRows
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.factors import LowRank
from loratool.adapters.told import scaling
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.models.heads import heads_of
from loratool.models.layouts.native import config_of, is_native_adapter, named_on_hub
from loratool.storage.fields import ABSENT, COUNT, NUMBER, TABLE, check_fields
from loratool.storage.filenames import CONFIG, PARAMS
from loratool.storage.tensors import TensorInfo

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
#: An entry of params.json, and what it holds.
_LORA = {"rank": COUNT | ABSENT, "scaling": NUMBER | ABSENT}


class Native(Dialect):
    """Low-rank factors under the names of Meta's and Mistral's own code."""

    name = "native"

    def claims(self, evidence: Evidence) -> str | None:
        named = is_native_adapter(evidence.tensors) and not evidence.config
        return "an adapter with Mistral's own names (mistral-finetune)" if named else None

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        params: dict[str, Any] = {}
        where = adapter.folder.path / PARAMS
        if adapter.folder.has(PARAMS):
            params = adapter.folder.json(PARAMS)
            check_fields(params, {"lora": TABLE | ABSENT}, where, AdapterError)
            check_fields(params.get("lora") or {}, _LORA, f"{where}, lora", AdapterError)
            adapter.producer = "mistral-finetune"
        heads = heads_of(base.config) if base is not None else None
        rows = RotaryRows(heads or heads_of(config_of(params, where)))
        _sort(adapter, rows)
        _add_modules(adapter, params.get("lora") or {}, rows)
        rows.note(adapter, [PARAMS, CONFIG])
        refuse_without_scale(
            adapter, f"scaling is in {PARAMS}, which mistral-finetune writes beside the weights"
        )
        refuse_shapes(adapter, {})
        refuse_empty(adapter)
        refuse_unknown(adapter)


def _sort(adapter: Adapter, rows: RotaryRows) -> None:
    """Take what is no factor: whole tensors that were trained too."""
    for name, info in adapter.tensors.items():
        if _FACTOR.fullmatch(name):
            continue
        found, heads = named_on_hub(name)
        if found == name or "lora_" in name:
            adapter.unknown.append(name)
        else:
            adapter.replaced[found] = _in_order(info, found, heads, rows)


def _add_modules(adapter: Adapter, lora: dict[str, Any], rows: RotaryRows) -> None:
    pairs: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in adapter.tensors.items():
        factor = _FACTOR.fullmatch(name)
        if factor:
            pairs[factor["path"]][factor["side"]] = info
    halves, ranks = {}, []
    for native, pair in pairs.items():
        path, heads = named_on_hub(native)
        if path == native:
            adapter.unknown += [info.name for info in pair.values()]
            continue
        if len(pair) < 2:
            halves[native] = [f"lora_{side}" for side in pair]
            continue
        a, b = pair["A"], pair["B"]
        rank = a.shape[0] if a.shape else 0
        if lora.get("rank") not in (None, rank):
            ranks.append(f"{native}: {PARAMS} gives {lora['rank']}, lora_A has {rank}")
        said = scaling(
            adapter.told, rank or 1, scale=lora.get("scaling"), origin=PARAMS, where=native
        )
        adapter.modules[path] = LowRank(
            path, "linear", a, _in_order(b, path, heads, rows), said.alpha, said.scale,
            scale_from=said.origin,
        )  # fmt: skip
    refuse_halves(adapter, halves, "lora_A and lora_B")
    refuse_modules(adapter, "rank-mismatch", f"has another rank than {PARAMS} gives", ranks)


def _in_order(info: TensorInfo, what: str, heads: str, rows: RotaryRows) -> TensorInfo:
    return rows.ordered(info, what, kv="key_value" in heads) if heads else info
