"""Bases and adapters large enough to be stopped in the middle of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.files import ADAPTED, State, lora_on, random_of, write_base
from helpers.places import FIXTURES

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


@dataclass(frozen=True)
class Here:
    """A folder as a place for shards, in which nothing is ever found finished."""

    own: Path

    @property
    def finished(self) -> Path:
        return self.own

    def note_of(self, name: str) -> None:
        return None

    def publish(self, name: str, digest: str, note: dict[str, Any], *parts: str) -> None:
        pass


def work_of(output: Path) -> list[Path]:
    """What runs for an output have on the disk right now."""
    return [
        path for path in output.parent.glob(f".{output.name}.loratool-work/**/*") if path.is_file()
    ]


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
