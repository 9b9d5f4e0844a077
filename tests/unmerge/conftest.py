"""A base, two adapters, and a reversible merge of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.files import lora_on, small_lora, small_state, write_base

import loratool


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[Path], Path]:
    """A base, two adapters, and what a reversible merge with weights made of them."""
    base = write_base(tmp_path / "base", small_state())
    rng = np.random.default_rng(6)
    adapters = [
        lora_on(tmp_path / name, rng.standard_normal((8, 2)), rng.standard_normal((2, 8)))
        for name in ("style", "task")
    ]
    loratool.merge(base, adapters, tmp_path / "out", weights=[0.7, -0.4], reversible=True)
    return base, adapters, tmp_path / "out"
