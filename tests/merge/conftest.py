"""A small adapter, and the trained fixtures merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.files import small_lora
from helpers.merging import ADAPTER, BASE

import loratool


@pytest.fixture(scope="session")
def fixture_merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixtures, merged."""
    output = tmp_path_factory.mktemp("merged") / "out"
    loratool.merge(BASE, ADAPTER, output)
    return output


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")
