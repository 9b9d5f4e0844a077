"""Small adapters of random values, and a reader of them that is not loratool's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file

from loratool.notices import Notice


def write_adapter(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None
) -> Path:
    """An adapter directory with these tensors; no adapter_config.json if `config` is None."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def pair(
    path: str, out: int, width: int, rank: int = 4, seed: int = 0, prefix: str = "base_model.model."
) -> dict[str, np.ndarray]:
    """Random `lora_A` and `lora_B` of a linear module."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}{path}.lora_A.weight": rng.standard_normal((rank, width)).astype(np.float32),
        f"{prefix}{path}.lora_B.weight": rng.standard_normal((out, rank)).astype(np.float32),
    }


Tensors = dict[str, np.ndarray]

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"
WEIGHTS = "adapter_model.safetensors"


def lora(
    folder: Path,
    *paths: str,
    rank: int = 4,
    seed: int = 0,
    extra: Tensors | None = None,
    **config: Any,
) -> Path:
    """An adapter with random factors on 12×10 modules, the first on Q if no path is given."""
    tensors: Tensors = {}
    for number, path in enumerate(paths or (Q,)):
        tensors |= pair(path, 12, 10, rank, 100 * seed + number)
    return write_adapter(folder, tensors | (extra or {}), {"r": rank, **config})


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """scale·B·A of every module in float64, read here without loratool."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    root = math.sqrt if config.get("use_rslora") else float
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            rank = (config.get("rank_pattern") or {}).get(path, config["r"])
            alpha = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
            assert a.shape[0] == rank
            b = tensors[name.replace("lora_A", "lora_B")]
            found[path] = alpha / root(rank) * b.astype(np.float64) @ a.astype(np.float64)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


class Report(Protocol):
    warnings: list[Notice]


def codes(report: Report) -> list[str]:
    return [notice.code for notice in report.warnings]
