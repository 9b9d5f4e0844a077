"""Two adapters to compare."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import K, Q, lora


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [lora(tmp_path / "one", Q, K, seed=1), lora(tmp_path / "two", Q, K, seed=2)]
