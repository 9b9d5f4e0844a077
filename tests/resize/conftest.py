"""An adapter to resize, and the place of the output."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import K, Q, lora


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return lora(tmp_path / "in" / "one", Q, K, lora_alpha=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
