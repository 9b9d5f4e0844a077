"""Small bases: of one tensor, and in two shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helpers.adapters import Q
from helpers.files import ADAPTED, NORM, OTHER, State, small_state


def small_base(folder: Path, dtype: type = np.float16, **extra: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    state = {f"{Q}.weight": np.ones((6, 5), dtype), **extra}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def halves() -> tuple[State, State]:
    """A base in two shards."""
    state = small_state()
    return {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER], NORM: state[NORM]}
