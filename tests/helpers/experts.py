"""Stacks of experts as PEFT's target_parameters stores them, made from a pair per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers.adapters import PREFIX, Tensors, write_adapter

EXPERTS = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
TARGETS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]

#: For each expert B [out, r] and A [r, in].
Pairs = list[tuple[np.ndarray, np.ndarray]]


def expert_pairs(count: int, out: int, width: int, rank: int, seed: int = 0) -> Pairs:
    """Random pairs of so many experts."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.standard_normal((out, rank), np.float32),
            rng.standard_normal((rank, width), np.float32),
        )
        for _ in range(count)
    ]


def packed(wrapper: str, pairs: Pairs, grouped: bool = False) -> Tensors:
    """lora_A [E·r, in] and lora_B [out, r·E] of a wrapper: in B the expert is fastest, if not
    `grouped`."""
    a = np.concatenate([a for _, a in pairs])
    b = np.stack([b for b, _ in pairs], axis=1 if grouped else 2)
    return {
        f"{PREFIX}{wrapper}.lora_A.weight": a,
        f"{PREFIX}{wrapper}.lora_B.weight": b.reshape(len(b), -1),
    }


def stacks(folder: Path, gate_up: Pairs, down: Pairs, grouped: bool = False, **config: Any) -> Path:
    """An adapter on gate_up_proj and down_proj of one layer's experts, as PEFT nests them."""
    tensors = packed(f"{EXPERTS}.base_layer", gate_up, grouped) | packed(EXPERTS, down, grouped)
    settings = {"target_modules": [], "target_parameters": TARGETS, "peft_version": "0.21.2"}
    return write_adapter(folder, tensors, settings | config)
