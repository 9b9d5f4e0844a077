"""Globs and ranges of layers on paths of any length."""

from __future__ import annotations

import time

import pytest

from loratool.paths import matches


@pytest.mark.parametrize(
    "glob", ["*a" * 40 + "b", "*[a]*" * 40 + "b", "?*" * 40 + "b", "*" * 500 + "b"]
)
def test_no_glob_runs_away(glob: str) -> None:
    """A glob takes time in proportion to its length and the path's, however many stars it has."""
    started = time.process_time()
    assert not matches("model." + "a" * 3000, [glob])
    assert time.process_time() - started < 5
