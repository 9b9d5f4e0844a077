"""Folders of adapters and models to list, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import loratool
from helpers.adapters import Q, pair
from loratool.cataloguing.entry import CatalogEntry


def entries(place: Path, **options: Any) -> dict[str, CatalogEntry]:
    """The entries below a folder by their paths, in their order."""
    return {entry.path: entry for entry in loratool.catalog(place, **options).entries}


def kohya(file: Path, rank: int = 4, seed: int = 0, **metadata: str) -> Path:
    """A file in kohya's names."""
    tensors = pair("x", 12, 10, rank, seed, prefix="")
    file.parent.mkdir(parents=True, exist_ok=True)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    named = {
        f"{name}.lora_down.weight": tensors["x.lora_A.weight"],
        f"{name}.lora_up.weight": tensors["x.lora_B.weight"],
    }
    save_file(named, file, {"ss_network_module": "networks.lora", **metadata})
    return file


def mlx(folder: Path, seed: int = 0, scale: float = 2.0, rank: int = 4) -> Path:
    """The adapter that `helpers.adapters.lora` makes, as MLX saves it."""
    tensors = pair(Q, 12, 10, rank, 100 * seed, prefix="")
    turned = {
        f"{Q}.lora_a": np.ascontiguousarray(tensors[f"{Q}.lora_A.weight"].T),
        f"{Q}.lora_b": np.ascontiguousarray(tensors[f"{Q}.lora_B.weight"].T),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(turned, folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A small model in one file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{Q}.weight": rng.standard_normal((12, 10)).astype(np.float16)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder
