"""A base of a few layers, adapters of all sorts of parts on it, and their merge by the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from helpers.adapters import deltas, pair, write_adapter
from helpers.files import State, random_of, write_base

LAYERS = 4
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
PATHS = [f"model.layers.{n}.{m}" for n in range(LAYERS) for m in MODULES]
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def layered_state() -> State:
    state = {f"{path}.weight": random_of(torch.float32, 12, 10, seed=i) for i, path in
             enumerate(PATHS)}  # fmt: skip
    return state | {
        HEAD: random_of(torch.float32, 9, 10, seed=90), NORM: random_of(torch.float32, 10, seed=91),
    }  # fmt: skip


def layered_base(folder: Path) -> Path:
    state = layered_state()
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    return write_base(folder, *halves)


def layered_lora(folder: Path, seed: int = 0, saves_head: bool = False) -> Path:
    """An adapter on all of `PATHS`, and on the head as a whole."""
    tensors: dict[str, np.ndarray] = {}
    for number, path in enumerate(PATHS):
        tensors |= pair(path, 12, 10, seed=100 * seed + number)
    config: dict[str, object] = {}
    if saves_head:
        tensors[f"base_model.model.{HEAD}"] = np.full((9, 10), 7.0, np.float32)
        config["modules_to_save"] = ["lm_head"]
    return write_adapter(folder, tensors, config)


Weight = Callable[[str], float]


def expected(*given: tuple[Path, Weight]) -> dict[str, np.ndarray]:
    """W + Σ weight·scale·B·A in float64, rounded once to float32, with a weight for each path."""
    found = {name: value.double().numpy() for name, value in layered_state().items()}
    for adapter, weight in given:
        for path, delta in deltas(adapter).items():
            found[f"{path}.weight"] = found[f"{path}.weight"] + weight(path) * delta
    return {name: value.astype(np.float32) for name, value in found.items()}


def close(merged: State, wanted: dict[str, np.ndarray]) -> bool:
    """Equal to some units in the last place, and exactly where nothing was added."""
    return merged.keys() == wanted.keys() and all(
        np.allclose(merged[name].numpy(), wanted[name], rtol=0, atol=2e-5) for name in wanted
    )
