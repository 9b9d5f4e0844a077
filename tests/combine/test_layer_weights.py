"""combine and compare with weights for ranges of layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import deltas
from helpers.choosing import PATHS, layered_lora

import loratool
from loratool.errors import UsageError


def factor(path: str) -> float:
    return 0.5 if path.split(".")[2] in ("0", "1") else 2.0


@pytest.fixture
def pair_of(tmp_path: Path) -> list[Path]:
    return [layered_lora(tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)]


@pytest.mark.parametrize("method", ["sum", "cat", "svd", "linear"])
def test_each_module_is_combined_with_its_weights(
    method: str, pair_of: list[Path], tmp_path: Path
) -> None:
    """As if its adapters were combined with these alone, by every kind of method."""
    out, text = tmp_path / "out", "2,0.5@layers.0-1"
    report = loratool.combine(pair_of, out, weights=[text, -1], method=method)
    assert report.weights == [text, -1.0]
    found = deltas(out)
    halves = {}
    for value in (0.5, 2.0):
        loratool.combine(pair_of, tmp_path / f"{value}", weights=[value, -1], method=method)
        halves[value] = deltas(tmp_path / f"{value}")
    for path in PATHS:
        assert np.allclose(found[path], halves[factor(path)][path], atol=1e-4)
    if method == "sum":
        one, two = map(deltas, pair_of)
        assert all(np.allclose(found[p], factor(p) * one[p] - two[p], atol=1e-4) for p in PATHS)
    record = json.loads((out / "loratool.json").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [text, -1.0]


def test_what_a_weighted_sum_holds_goes_by_module(pair_of: list[Path]) -> None:
    """compare's shares are those of the sum that combine would make."""
    report = loratool.compare(pair_of, weights=["2,0.5@layers.0-1", -1])
    one, two = map(deltas, pair_of)
    parts = [
        np.concatenate([(w * d[p]).reshape(-1) for p in PATHS for w in [weigh(p)]])
        for d, weigh in ((one, factor), (two, lambda _: -1.0))
    ]
    total = parts[0] + parts[1]
    for share, part in zip(report.survival, parts, strict=True):
        assert share == pytest.approx(float(part @ total / (part @ part)), abs=1e-5)
    apart = sum(float(part @ part) for part in parts)
    assert report.sum_share == pytest.approx(float(total @ total) / apart, abs=1e-5)
    for module in report.modules:
        own = [factor(module.path) * one[module.path], -two[module.path]]
        assert module.sum_norm == pytest.approx(float(np.linalg.norm(own[0] + own[1])), rel=1e-4)


def test_a_range_that_meets_nothing_is_refused(pair_of: list[Path], tmp_path: Path) -> None:
    """In both."""
    with pytest.raises(UsageError, match="meets no module"):
        loratool.combine(pair_of, tmp_path / "out", weights=["2@layers.7-", 1])
    with pytest.raises(UsageError, match="meets no module"):
        loratool.compare(pair_of, weights=["2@layers.7-", 1])
