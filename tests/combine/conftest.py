"""Adapters to combine, and what was made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import K, Q, lora

import loratool


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [lora(tmp_path / "in" / "one", seed=1), lora(tmp_path / "in" / "two", seed=2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Two adapters of different ranks, scales and modules, and what was made of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = [
        lora(folder / "a", Q, K, rank=2, seed=1, target_modules=["q_proj", "k_proj"]),
        lora(folder / "b", Q, rank=5, seed=2, lora_alpha=5, use_rslora=True,
             target_modules=["q_proj"]),
    ]  # fmt: skip
    loratool.combine(sources, folder / "out")
    return sources, folder / "out"


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """Two adapters with six modules."""
    paths = [f"model.layers.{n}.q_proj" for n in range(6)]
    return [lora(tmp_path / "in" / str(n), *paths, seed=n) for n in range(2)]
