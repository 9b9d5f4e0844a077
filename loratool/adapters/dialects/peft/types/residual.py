"""DEFT with PaRa, and PEANuT: what is added is computed from the weight itself.

Sources: peft/tuners/deft/layer.py (`get_delta_weight`), peft/tuners/peanut/layer.py
(`_compute_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.adapters.told import scaling
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER, TEXT, FieldType, value_text

_DECOMPOSITIONS = ("relu", "qr")


def _deft(module: PeftModule) -> Iterable[Made]:
    """W' = W + Q(s·R - Vᵀ·W), with Q and V from P; PaRa has no R."""
    config = module.config
    alone = bool(config.get("para"))
    parts = dict(zip("P" if alone else "PR", module.need(*_deft_slots(alone)), strict=True))
    if alone and "deft_R" in module.tensors:
        raise Trouble("peft-options", "para is set, and there is a deft_R that it has no use for")
    p = parts["P"]
    module.require(len(p.shape) == 2)
    out, rank = p.shape
    if rank != min(config.get("r", 8), out):
        raise Trouble("rank-mismatch", f"the config gives {config.get('r', 8)}, deft_P has {rank}")
    width = 0
    if not alone:
        module.require(len(parts["R"].shape) == 2 and parts["R"].shape[0] == rank)
        width = parts["R"].shape[1]
    alpha = config.get("alpha")
    if alpha:
        scaled = scaling(module.adapter.told, rank, alpha=alpha, where=module.path)
    else:
        scaled = module.scaled()
    orthogonal = config.get("decomposition_method", "relu") == "qr"
    settings = {"scale": scaled.scale or 0.0, "orthogonal": orthogonal}
    yield RowFunction(
        module.path, "PaRa" if alone else "DEFT", parts, (out, width),
        partial(_projected, **settings), partial(_projected_turned, **settings),
        gather=partial(_on_the_right, orthogonal=orthogonal),
    )  # fmt: skip


def _deft_slots(alone: bool) -> tuple[str, ...]:
    return ("deft_P",) if alone else ("deft_P", "deft_R")


def _sides(P: Float64, orthogonal: bool) -> tuple[Float64, Float64]:
    """Q and V."""
    if orthogonal:
        q = np.linalg.qr(P)[0]
        return q, q
    return P, np.maximum(P, 0)


def _on_the_right(P: Float64, R: Float64 | None = None, *, orthogonal: bool) -> Rows:
    """The part of Vᵀ·W that rows make."""
    right = _sides(P, orthogonal)[1]
    return lambda first, rows: right[first : first + len(rows)].T @ rows


def _projected(
    gathered: Float64, P: Float64, R: Float64 | None = None, *, scale: float, orthogonal: bool
) -> Rows:
    left = _sides(P, orthogonal)[0]
    factor = -gathered if R is None else scale * R - gathered
    return lambda first, rows: rows + left[first : first + len(rows)] @ factor


def _projected_turned(
    P: Float64, R: Float64 | None = None, *, scale: float, orthogonal: bool
) -> Rows:
    left, right = _sides(P, orthogonal)
    injected = None if R is None else scale * R.T

    def made(first: int, rows: Float64) -> Float64:
        removed = rows @ right
        factor = -removed if injected is None else injected[first : first + len(rows)] - removed
        changed: Float64 = rows + factor @ left.T
        return changed

    return made


#: PEANuT's functions, by the names that transformers has for them, as torch.nn.functional calls
#: them.
_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}), "relu6": ("relu6", {}), "leaky_relu": ("leaky_relu", {}),
    "silu": ("silu", {}), "swish": ("silu", {}), "mish": ("mish", {}),
    "tanh": ("tanh", {}), "sigmoid": ("sigmoid", {}), "gelu": ("gelu", {}),
    "gelu_new": ("gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": "tanh"}),
}  # fmt: skip


def _peanut(module: PeftModule) -> Iterable[Made]:
    """W' = W + s·B·f(…f(A·W)), a small network that all columns of the weight go through."""
    a, b = module.need("peanut_A", "peanut_B")
    module.require(len(a.shape) == 2 and b.shape == a.shape[::-1])
    rank, out = a.shape
    config = module.config
    if rank != config.get("r", rank):
        raise Trouble("rank-mismatch", f"the config gives {config['r']}, peanut_A has {rank}")
    depth = config.get("depth", 0)
    if len(module.tensors) != 2 + 2 * depth:
        found = sum(slot.startswith("peanut_encoders") for slot in module.tensors)
        raise Trouble("half-a-pair", f"it has {found} encoders, the config's depth is {depth}")
    names = [f"peanut_{kind}coders.{i}" for kind in ("en", "de") for i in range(depth)]
    blocks = module.need(*names)
    module.require(all(block.shape == (rank, rank) for block in blocks))
    name = config.get("act_fn", "relu")
    if name not in _FUNCTIONS:
        known = ", ".join(sorted(_FUNCTIONS))
        raise Trouble(
            "peft-options", f"act_fn is {value_text(name)}; those that are known are {known}"
        )
    scaled = module.scaled(config.get("scaling", 1.0))
    parts = {"A": a, "B": b} | {f"block{i}": block for i, block in enumerate(blocks)}
    apply = partial(_through_network, function=name, scale=scaled.scale or 0.0)
    yield RowFunction(module.path, "PEANuT", parts, (out, 0), apply, step=0)


def _through_network(
    A: Float64, B: Float64, *, function: str, scale: float, **blocks: Float64
) -> Rows:
    import torch

    called, options = _FUNCTIONS[function]
    matrices = [torch.from_numpy(blocks[f"block{i}"]) for i in range(len(blocks))]
    depth = len(matrices) // 2

    def bent(values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(torch.nn.functional, called)(values, **options)
        return found

    def made(first: int, rows: Float64) -> Float64:
        hidden = bent(torch.from_numpy(np.ascontiguousarray((A @ rows).T)))
        kept = []
        for encoder in matrices[:depth]:
            kept.append(hidden)
            hidden = bent(hidden @ encoder.T)
        for decoder, before in zip(matrices[depth:], reversed(kept), strict=True):
            hidden = bent(hidden @ decoder.T) + before
        changed: Float64 = rows + scale * (B @ hidden.numpy().T)
        return changed

    return made


DEFT = PeftMethod(
    "DEFT", "DEFT", ("deft_[PR]",), _deft,
    {
        "r": COUNT, "alpha": NUMBER | ABSENT, "para": FLAG | ABSENT,
        "decomposition_method": FieldType("relu or qr", lambda v: v in _DECOMPOSITIONS),
    },
    frozenset({"init_scale", "deft_dropout"}),
    shown=("r", "alpha", "decomposition_method", "para"),
)  # fmt: skip
PEANUT = PeftMethod(
    "PEANUT", "PEANuT", ("peanut_[AB]", "peanut_encoders", "peanut_decoders"), _peanut,
    {"r": COUNT, "depth": COUNT, "scaling": NUMBER,
     "act_fn": TEXT},
    rest=r"(?:\.\d+)?", shown=("r", "depth", "act_fn", "scaling"),
)  # fmt: skip
