"""Bases and adapters large enough to be stopped in the middle of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from helpers.files import ADAPTED, State, lora_on, random_of, write_base
from helpers.places import FIXTURES

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


def large_base(folder: Path, megabytes: int, shards: int = 2) -> Path:
    """A base of random bfloat16 in shards, with an adapted tensor in the first."""
    block = random_of(torch.bfloat16, 512 * 1024, seed=4)
    parts: list[State] = [{} for _ in range(shards)]
    parts[0][ADAPTED] = random_of(torch.bfloat16, 1024, 1024)
    for number in range(megabytes):
        parts[number % shards][f"model.layers.{number}.mlp.weight"] = block + number
    return write_base(folder, *parts)


def large_lora(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    return lora_on(folder, rng.standard_normal((1024, 4)), rng.standard_normal((4, 1024)))


def open_files(below: Path) -> list[str]:
    """What this process has open below a directory."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(below))]
