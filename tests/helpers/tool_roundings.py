"""The factors of the fixtures' adapter, for other tools' arithmetic."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file

from helpers.places import FIXTURES

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


@cache
def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B and A of the fixture's adapter, by the tensor they belong to; the scale is 2."""
    state = load_file(ADAPTER / "adapter_model.safetensors")
    found = {}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{path}.weight"] = state[name.replace("_A.", "_B.")], a
    return found
