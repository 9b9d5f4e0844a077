"""Bases for the undo file, and how it is broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from helpers.adapters import write_adapter
from helpers.files import ADAPTED, NORM, OTHER, State, random_of, write_base

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def several_blocks(folder: Path) -> tuple[Path, list[Path]]:
    """A base of all float dtypes, and a plain and a DoRA adapter for it."""
    state = {
        ADAPTED: random_of(torch.bfloat16, 40, 24, seed=1),
        OTHER: random_of(torch.float32, 30, 24, seed=2),
        "model.double.weight": random_of(torch.float64, 20, 24, seed=3),
        "model.embed_tokens.weight": random_of(torch.float16, 50, 24, seed=4),
        NORM: random_of(torch.float32, 1001, seed=5),
        "model.ids": random_of(torch.int64, 300, seed=6),
    }
    base = write_base(folder / "base", state)
    names = [ADAPTED, OTHER, "model.double.weight"]
    rows = {name: state[name].shape[0] for name in names}
    rng = np.random.default_rng(7)
    adapters = []
    for kind in ("plain", "dora"):
        tensors = {}
        for name in names:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((3, 24)) * 0.1
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((rows[name], 3)) * 0.1
            if kind == "dora":
                tensors[f"{path}.lora_magnitude_vector"] = rng.uniform(1, 5, rows[name])
        path = "base_model.model.model.embed_tokens"
        tensors[f"{path}.lora_embedding_A"] = rng.standard_normal((3, 50)) * 0.1
        tensors[f"{path}.lora_embedding_B"] = rng.standard_normal((24, 3)) * 0.1
        if kind == "dora":
            tensors[f"{path}.lora_magnitude_vector"] = rng.uniform(1, 5, 24)
        single = {key: value.astype(np.float32) for key, value in tensors.items()}
        config = {"r": 3, "lora_alpha": 4, "use_dora": kind == "dora"}
        adapters.append(write_adapter(folder / kind, single, config))
    return base, adapters


def load_one(path: Path) -> State:
    from safetensors.torch import load_file

    found: State = load_file(path)
    return found


def replace_z(lora: Path) -> None:
    """Let the adapter replace z.weight, too."""
    path = lora / "adapter_model.safetensors"
    saved = {"base_model.model.z.modules_to_save.default.weight": random_of(torch.float32, 6, 5)}
    save_file({**load_one(path), **saved}, path, {"format": "pt"})
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["z"]}))
