"""compare with a base: intruders, and bases that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.adapters import Q
from helpers.cli import run_cli
from helpers.comparing import fails, of
from helpers.files import write_base
from helpers.golden import golden
from helpers.quantised import llama_state, write_nf4_base

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


def test_a_quantised_base_is_its_values(tmp_path: Path) -> None:
    """Intruders are counted against what codes stand for, also in a matrix of a stack."""
    state = llama_state(64)
    plain = write_base(tmp_path / "plain", write_nf4_base(tmp_path / "nf4", state))
    new = np.random.default_rng(5).standard_normal((64, 1))
    adapters = [
        of(tmp_path / str(size), {Q: (size * new, new.T / 64)}) for size in (0.01, 30.0, 100.0)
    ]
    counts = [
        loratool.compare(adapters, base=base).modules[0].intruders
        for base in (tmp_path / "nf4", plain)
    ]
    assert counts[0] == counts[1] == [0, 1, 1]
    case = golden("mxfp4-gpt-oss")
    name = next(n for n in case.expected if n.endswith("down_proj"))
    values = case.expected[name].float()
    path = f"{name.rpartition('.')[0]}.1.down_proj"
    rest = {n: t for n, t in case.stored.items() if "experts" not in n}
    config = {k: v for k, v in case.config.items() if k != "quantization_config"}
    plain = write_base(tmp_path / "plain-stack", case.expected | rest, config=config)
    left, right = np.ones((values.shape[2], 1)), np.ones((1, values.shape[1]))
    sizes = [float(values.norm()) * share for share in (1e-6, 10)]
    pair = [of(tmp_path / f"e{n}", {path: (n * left, right)}) for n in sizes]
    counts = [
        loratool.compare(pair, base=base).modules[0].intruders
        for base in (case.lay(tmp_path / "stack"), plain)
    ]
    assert counts[0] == counts[1]
    assert counts[0] is not None
    assert None not in counts[0]


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
