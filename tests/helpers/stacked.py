"""Bases and adapters with experts and split weights, of random values, as PEFT packs them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool

EXPERTS, HIDDEN, INNER, RANK, SCALE = 3, 8, 6, 2, 1.5
LAYER = "model.layers.0.mlp"
Arrays = dict[str, np.ndarray]
random = np.random.default_rng(5)


def values(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


@dataclass
class Stack:
    """Random factors of a parameter `[E, out, in]`, as PEFT packs them, and its deltas."""

    out: int
    width: int
    experts: int = EXPERTS
    a: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.a = values(self.experts * RANK, self.width)
        self.b = values(self.out, RANK * self.experts)

    def delta(self, expert: int) -> np.ndarray:
        a = self.a[expert * RANK : (expert + 1) * RANK].astype(np.float64)
        delta: np.ndarray = SCALE * self.b[:, expert :: self.experts].astype(np.float64) @ a
        return delta


def write_base(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir()
    prefixed = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "peft_version": "0.21.2",
        "target_modules": [], **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def stacks(
    folder: Path, gate_up: Stack, down: Stack | None, at: str = LAYER, **config: Any
) -> Path:
    """An adapter on the two parameters of `experts`, or on gate_up_proj alone."""
    inner = f"{at}.experts.base_layer" if down else f"{at}.experts"
    tensors = {f"{inner}.lora_A.weight": gate_up.a, f"{inner}.lora_B.weight": gate_up.b}
    names = ["mlp.experts.gate_up_proj"]
    if down:
        tensors |= {f"{at}.experts.lora_A.weight": down.a, f"{at}.experts.lora_B.weight": down.b}
        names.append("mlp.experts.down_proj")
    return write_adapter(folder, tensors, target_parameters=names, **config)


def single(experts: Sequence[int] = range(EXPERTS), at: str = LAYER) -> Arrays:
    """Experts with a tensor each."""
    return {
        f"{at}.experts.{expert}.{name}_proj.weight": values(*shape)
        for expert in experts
        for name, shape in (
            ("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER)),
        )
    }  # fmt: skip


def merged(base: Path, adapter: Path, **options: Any) -> Arrays:
    out = base.parent / "out"
    loratool.merge(base, adapter, out, dtype="float32", **options)
    return load_file(out / "model.safetensors")


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found, expected, rtol=1e-6, atol=1e-6))


def refused(base: Path, adapter: Path, error: type[Exception], *words: str) -> None:
    before = sorted(base.parent.iterdir())
    with pytest.raises(error) as found:
        merged(base, adapter)
    for word in words:
        assert word in str(found.value)
    assert sorted(base.parent.iterdir()) == before
