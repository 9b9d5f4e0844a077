"""A base in two shards, and an adapter for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bases import halves
from helpers.files import small_lora, write_base


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", *halves())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")
