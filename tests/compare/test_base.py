"""compare with a base: intruders, and bases that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.adapters import Q
from helpers.cli import run_cli
from helpers.comparing import fails, of
from helpers.files import write_base

import loratool
from loratool.errors import LoraToolError, MatchError


def test_intruders_are_counted_against_the_base(tmp_path: Path) -> None:
    """A large direction that the base lacks is an intruder, a small or an old one is none."""
    import torch

    values = np.linspace(10, 1, 10)
    left = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    right = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))[0]
    weight = (left[:, :10] * values) @ right
    state = {f"{Q}.weight": torch.tensor(weight).float(), "model.norm.weight": torch.ones(10)}
    base = write_base(tmp_path / "base", state)
    new = left[:, 10:11]
    adapters = [
        of(tmp_path / "new", {Q: (100 * new, right[:1])}),
        of(tmp_path / "small", {Q: (0.01 * new, right[:1])}),
        of(tmp_path / "old", {Q: (5 * left[:, :1], right[:1])}),
    ]
    report = loratool.compare(adapters, base=base)
    assert report.modules[0].intruders == [1, 0, 0]
    assert report.base == str(base)
    words = run_cli("compare", *map(str, adapters), "--base", str(base)).stdout
    assert "intruders" in words
    assert loratool.compare(adapters).modules[0].intruders is None


def test_intruders_of_the_fixtures(adapter: Path, base: Path) -> None:
    """The fixtures can be compared against their base: a count from 0 to 10 for every module."""
    report = loratool.compare([adapter, adapter], base=base, layers="0")
    assert len(report.modules) == 7
    for module in report.modules:
        assert module.intruders is not None
        assert module.intruders[0] == module.intruders[1]
        assert 0 <= (module.intruders[0] or 0) <= 10


def test_a_base_that_does_not_fit(tmp_path: Path, two: list[Path], base: Path) -> None:
    """A base without the modules, an adapter in its place, and nothing there are refused."""
    fails(MatchError, two, str(base), base=base)
    fails(LoraToolError, two, base=tmp_path / "nothing")
    fails(LoraToolError, two, base=two[0])
