"""Three adapters and more: pairs, matrices and what they share."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import K, Q, deltas, lora
from helpers.cli import run_cli

import loratool


def test_three_adapters_make_a_matrix(tmp_path: Path) -> None:
    """Three adapters give three pairs in order, a matrix of cosines and a verdict for each."""
    adapters = [lora(tmp_path / name, Q, K, seed=n) for n, name in enumerate("xyz")]
    report = loratool.compare(adapters, weights=[1, 2, -1])
    assert [(p.a, p.b) for p in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    dense = [np.concatenate([d.ravel() for _, d in sorted(deltas(a).items())]) for a in adapters]
    total = dense[0] + 2 * dense[1] - dense[2]
    for p in report.pairs:
        x, y = dense[p.a], dense[p.b]
        assert p.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
    assert report.survival == pytest.approx(
        [d @ total / (w * d @ d) for d, w in zip(dense, [1, 2, -1], strict=True)], rel=1e-5
    )
    words = run_cli("compare", *map(str, adapters)).stdout
    rows = re.findall(r"^ *([ABC])((?: +-?\d+\.\d\d| +1)+) *$", words, re.MULTILINE)
    assert [name for name, _ in rows] == list("ABC")
    values = [row.split() for _, row in rows]
    assert all(values[i][i] == "1" for i in range(3))
    assert values[0][1] == values[1][0] == f"{report.pairs[0].cosine:.2f}"
    assert values[0][2] == values[2][0] == f"{report.pairs[1].cosine:.2f}"
    assert len(re.findall(r"^[AB] and [BC] ", words, re.MULTILINE)) == 3


def test_modules_of_some_adapters_only(tmp_path: Path) -> None:
    """With three adapters a module that two have is compared between these."""
    adapters = [lora(tmp_path / "a", Q), lora(tmp_path / "b", Q, K, seed=1),
                lora(tmp_path / "c", K, seed=2)]  # fmt: skip
    report = loratool.compare(adapters)
    by_path = {m.path: m for m in report.modules}
    assert by_path[Q].ranks == [4, 4, None]
    assert by_path[K].ranks == [None, 4, 4]
    assert [p.cosine is None for p in by_path[K].pairs] == [True, True, False]
    assert report.verdicts[1] == "disjoint"
    assert "disjoint" not in (report.verdicts[0], report.verdicts[2])


def test_many_adapters_do_not_fill_the_screen(tmp_path: Path) -> None:
    """Of many pairs those that have little to do with each other are counted, not listed."""
    sources = [str(lora(tmp_path / str(n), Q, K, seed=n)) for n in range(6)]
    done = run_cli("compare", *sources)
    assert "of 15 pairs have little to do with each other" in done.stdout
    assert done.stdout.count("little to do") <= 2
