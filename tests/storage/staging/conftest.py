"""A base and an adapter in a folder of inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.files import small_lora, small_state, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "in" / "base", small_state())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "in" / "lora")
