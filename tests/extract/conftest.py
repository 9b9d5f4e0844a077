"""A small base and its fine-tune."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.extracting import Pair, model, moved


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    """A model in which everything changed."""
    state = model()
    return Pair(tmp_path, state, moved(state))
