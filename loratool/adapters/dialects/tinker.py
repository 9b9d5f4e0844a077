"""Tinker: PEFT's files and config, with the experts of a layer in one tensor and names of its own.

`experts.w1`, `w3`, `w2` are gate, up and down of all experts: A `[E, r, in]`, B `[E, out, r]`, of
which one may have a 1 for E, because all experts share it. `unembed_tokens` is the head. Read by
tinker_cookbook, `weights/_merge*.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.peft import Peft
from loratool.adapters.dialects.peft.keys import fill_adapter
from loratool.adapters.dialects.peft.names import is_of_tinker, plain_path
from loratool.adapters.dialects.stacks import check_experts
from loratool.adapters.dialects.troubles import refuse_modules
from loratool.adapters.factors import LowRank
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import is_token_embedding
from loratool.models.layouts.tying import head_of
from loratool.storage.composed import joined, member
from loratool.storage.computed import Array, computed_tensor
from loratool.storage.tensors import TensorInfo

_PEFT = Peft()

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_EXPERTS = re.compile(r"(?P<owner>.+\.experts)\.(?P<leaf>w[123])")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
#: Experts without a gate; `w3` is there and empty.
_WITHOUT_GATE = {"w1": "up_proj", "w2": "down_proj"}

#: What is one matrix in files and has factors for each of its parts, from above: of Qwen3.5.
_QKV = ("in_proj_q", "in_proj_k", "in_proj_v")

_Factors = dict[str, TensorInfo]


@dataclass(frozen=True)
class Tinker(Dialect):
    """LoRA as Tinker's service gives it out."""

    name: str = "tinker"

    def claims(self, evidence: Evidence) -> str | None:
        kind = str(evidence.config.get("peft_type") or "LORA").upper()
        mine = evidence.top == "dict" and kind == "LORA" and is_of_tinker(evidence.tensors)
        return "a Tinker LoRA adapter" if mine else None

    def check(self, config: dict[str, Any], where: object) -> None:
        _PEFT.check(config, where)

    def declared(self, config: dict[str, Any]) -> Declared:
        return replace(_PEFT.declared(config), library="")

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        own = adapter.tensors
        adapter.producer = "Tinker"
        adapter.tensors = _as_peft(adapter, base)
        try:
            fill_adapter(adapter)
        finally:
            adapter.tensors = own
        if any(is_token_embedding(m.weight_name) for m in adapter.modules.values()):
            adapter.declared = replace(adapter.declared, ties_head=True)
        for owner in [p.removesuffix(_QKV[0]) for p in adapter.modules if p.endswith(_QKV[0])]:
            _stack(adapter, owner, _QKV, "in_proj_qkv")
        if base is not None and base.model_type == "nemotron_h":
            _stack_mixers(adapter, base)


def _as_peft(adapter: Adapter, base: Checkpoint | None) -> dict[str, TensorInfo]:
    """The tensors by the keys that PEFT would give them, those of experts one by one."""
    found: dict[str, TensorInfo] = {}
    modules: dict[str, _Factors] = defaultdict(dict)
    for key, info in adapter.tensors.items():
        factor = _FACTOR.fullmatch(plain_path(key))
        if factor is None or factor["side"] in modules[factor["path"]]:
            found[key] = info
        else:
            modules[factor["path"]][factor["side"]] = info

    def put(path: str, factors: _Factors) -> None:
        for side, info in factors.items():
            if found.setdefault(f"base_model.model.{path}.lora_{side}.weight", info) is not info:
                adapter.unknown.append(info.name)

    gateless = _is_gateless(modules, base)
    leaves = _WITHOUT_GATE if gateless else _LEAVES
    count, wrong = 0, []
    for path, own in modules.items():
        experts = _EXPERTS.fullmatch(path)
        if experts is None:
            for name in _named(path, base):
                put(name, own)
            continue
        leaf = leaves.get(experts["leaf"])
        if leaf is None and not _size(own):
            adapter.inert += [info.name for info in own.values()]
        elif leaf is None or not (number := _experts_of(own)):
            wrong.append(f"{path}: {', '.join(f'{s} {list(t.shape)}' for s, t in own.items())}")
        else:
            count += number
            check_experts(adapter, count)
            for i in range(number):
                one = {s: member(t, i if t.shape[0] > 1 else 0) for s, t in own.items()}
                put(f"{experts['owner']}.{i}.{leaf}", one)
    refuse_modules(
        adapter, "pair-mismatch",
        "has no factors of experts, which are A [E, r, in] and B [E, out, r], one of them perhaps "
        "with 1 for E", wrong,
    )  # fmt: skip
    return found


def _is_gateless(modules: Mapping[str, _Factors], base: Checkpoint | None) -> bool:
    """Whether the experts have no gate: so the base says, or without one empty factors do."""
    if base is not None:
        return base.model_type == "nemotron_h"
    gates = [_size(own) for path, own in modules.items() if path.endswith(".experts.w3")]
    return bool(gates) and not any(gates)


def _size(factors: _Factors) -> int:
    return sum(info.numel for info in factors.values())


def _experts_of(factors: _Factors) -> int:
    """How many experts have these factors; 0 if they are none of experts."""
    shapes = [factors[side].shape for side in "AB" if side in factors]
    if len(shapes) < 2 or any(len(shape) != 3 or 0 in shape for shape in shapes):
        return 0
    (first, rank, _), (second, _, other) = shapes
    count = max(first, second)
    return count if rank == other and min(first, second) in (1, count) and count > 1 else 0


def _named(path: str, base: Checkpoint | None) -> list[str]:
    """The paths in the files of the Hub of a module that is no expert's.

    A head that is the embedding's matrix has two: Tinker's own export changes both.
    """
    if base is not None and base.model_type == "gpt_oss":
        path = re.sub(r"\.attn\.", ".self_attn.", path)
    owner, _, leaf = path.rpartition(".")
    if leaf != "unembed_tokens":
        return [path]
    embedding = f"{owner}.embed_tokens".lstrip(".")
    is_tied = base is not None and head_of(base, embedding) is not None
    return ["lm_head", embedding] if is_tied else ["lm_head"]


def _stack_mixers(adapter: Adapter, base: Checkpoint) -> None:
    """Put factors of the first two parts of Mamba's input projection together."""
    rows = {
        name.removesuffix("in_proj.weight").partition(".")[2]: info.shape[0]
        for name, info in base.tensors.items()
        if name.endswith(".mixer.in_proj.weight") and info.shape
    }
    for path in [p for p in adapter.modules if p.endswith(".mixer.x_proj")]:
        owner = path.removesuffix("x_proj")
        _stack(
            adapter, owner, ("gate_proj", "x_proj"), "in_proj", rows.get(owner.partition(".")[2])
        )


def _stack(
    adapter: Adapter, owner: str, parts: Sequence[str], whole: str, rows: int | None = 0
) -> None:
    """Make one module of several that are parts of one matrix, one above the other.

    The matrix has `rows` rows, if more than the parts; None if it is not known.
    """
    pairs = [adapter.modules.get(owner + part) for part in parts]
    sound = [p for p in pairs if isinstance(p, LowRank) and p.adds and p.bias is None]
    alike = {(p.scale, p.shape[1], p.a.dtype, p.b.dtype, p.kind, p.is_sound) for p in sound}
    if rows is None or len(sound) < len(parts) or len(alike) != 1 or not sound[0].is_sound:
        return  # as they are they find no place
    rank = sum(pair.rank for pair in sound)
    height = max(rows, sum(pair.shape[0] for pair in sound))
    name, scale = owner + whole, sound[0].scale
    a = joined(f"{name} A", (rank, sound[0].shape[1]), [pair.a for pair in sound])
    b = computed_tensor(
        f"{name} B", (height, rank), [pair.b for pair in sound],
        partial(_diagonal, rows=height, columns=rank), sound[0].b.dtype,
    )  # fmt: skip
    for part in parts:
        del adapter.modules[owner + part]
    adapter.modules[name] = LowRank(
        name, "linear", a, b, None if scale is None else scale * rank, scale,
        scale_from=sound[0].scale_from,
    )  # fmt: skip


def _diagonal(*parts: Array, rows: int, columns: int) -> Array:
    out = np.zeros((rows, columns), parts[0].dtype)
    row = column = 0
    for part in parts:
        out[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return out
