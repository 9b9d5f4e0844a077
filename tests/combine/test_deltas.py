"""What combined adapters compute, against dense matrices in float64."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, WEIGHTS, K, Q, Tensors, codes, deltas, lora, write_adapter
from helpers.combining import assert_near, total
from helpers.outcomes import sha256s
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loratool
from loratool.linalg.methods import METHODS

QUICK = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

numbers = st.floats(-4, 4).filter(lambda w: abs(w) > 0.01)


@st.composite
def several(draw: st.DrawFn, least: int = 2) -> tuple[list[dict[str, Any]], list[float]]:
    """Settings of a few small adapters of any rank, scale and modules; and weights."""
    count = draw(st.integers(least, 3))
    found = [
        {
            "rank": draw(st.integers(1, 12)),
            "lora_alpha": draw(st.integers(1, 32)),
            "use_rslora": draw(st.booleans()),
            "seed": draw(st.integers(0, 1000)) + 1001 * n,
            "paths": draw(st.sampled_from([(Q,), (Q, K), (K,)])),
        }
        for n in range(count)
    ]
    return found, [draw(numbers) for _ in range(count)]


def made(folder: Path, kinds: list[dict[str, Any]]) -> list[Path]:
    """The adapters of these settings."""
    return [
        lora(folder / str(n), *kind["paths"], **{k: v for k, v in kind.items() if k != "paths"})
        for n, kind in enumerate(kinds)
    ]


def size_of(folders: list[Path], weights: list[float]) -> float:
    """What rounding is measured by: the norms of all that is added up."""
    return sum(
        abs(w) * float(np.linalg.norm(d))
        for f, w in zip(folders, weights, strict=True)
        for d in deltas(f).values()
    )


@QUICK
@given(several(1), st.sampled_from(["sum", "cat"]))
def test_the_sum_is_the_sum(given_: tuple[list[dict[str, Any]], list[float]], method: str) -> None:
    """sum and cat equal the dense Σ weight·scale·B·A, for all ranks, scales and weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        report = loratool.combine(
            sources, folder / "out", weights=weights, method=method, dtype="float32", threads=1
        )
        result, size = deltas(folder / "out"), size_of(sources, weights)
        expected = total(sources, weights)
        assert_near(result, expected, size)
        assert report.error < 1e-6
        for module in report.modules:
            assert module.norm == pytest.approx(
                np.linalg.norm(expected[module.path]), abs=1e-6 * size
            )
        if method == "sum":
            wanted = max(
                np.linalg.matrix_rank(d, 1e-4 * np.linalg.norm(d)) for d in expected.values()
            )
            assert report.rank >= wanted
            assert report.rank <= 10


@QUICK
@given(several(2), numbers)
def test_the_sum_commutes_and_is_linear(
    given_: tuple[list[dict[str, Any]], list[float]], factor: float
) -> None:
    """The order does not matter, and a factor on all weights is a factor on the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        size = size_of(sources, weights)
        options: dict[str, Any] = {"dtype": "float32", "threads": 1}
        loratool.combine(sources, folder / "a", weights=weights, **options)
        loratool.combine(sources[::-1], folder / "b", weights=weights[::-1], **options)
        loratool.combine(sources, folder / "c", weights=[factor * w for w in weights], **options)
        first = deltas(folder / "a")
        assert_near(first, deltas(folder / "b"), size)
        scaled = {path: factor * delta for path, delta in first.items()}
        assert_near(scaled, deltas(folder / "c"), size * max(1, abs(factor)))


@QUICK
@given(several(1))
def test_one_adapter_with_weight_one_computes_the_same(
    given_: tuple[list[dict[str, Any]], list[float]],
) -> None:
    """Combining one adapter, or it and others with weight 0, gives its own delta."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = made(folder, given_[0])
        alone = loratool.combine(sources[0], folder / "a", dtype="float32", threads=1)
        weights = [1.0] + [0.0] * (len(sources) - 1)
        loratool.combine(sources, folder / "b", weights=weights, dtype="float32", threads=1)
        own = deltas(sources[0])
        assert_near(deltas(folder / "a"), own, size_of(sources[:1], [1]))
        assert sha256s(folder / "a")[WEIGHTS] == sha256s(folder / "b")[WEIGHTS]
        assert alone.rank <= given_[0][0]["rank"]


@QUICK
@given(several(2), st.integers(1, 12))
def test_a_cut_is_the_best_of_its_rank(
    given_: tuple[list[dict[str, Any]], list[float]], rank: int
) -> None:
    """--rank keeps the largest singular values of the sum, and reports what they hold."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        options: dict[str, Any] = {"weights": weights, "dtype": "float32", "threads": 1}
        report = loratool.combine(sources, folder / "out", rank=rank, **options)
        assert report.rank <= rank
        assert ("rank-not-reached" in codes(report)) == (report.rank < rank)
        result, size = deltas(folder / "out"), size_of(sources, weights)
        for module in report.modules:
            u, s, v = np.linalg.svd(total(sources, weights)[module.path])
            best = (u[:, :rank] * s[:rank]) @ v[:rank] if rank < 10 else None
            kept = np.sum(s[:rank] ** 2) / np.sum(s**2)
            assert module.kept == pytest.approx(kept, abs=1e-5)
            assert module.error**2 == pytest.approx(1 - kept, abs=1e-5)
            off = np.linalg.norm(result[module.path] - total(sources, weights)[module.path])
            assert off == pytest.approx(math.sqrt(np.sum(s[rank:] ** 2)), abs=1e-5 * size)
            assert best is None or np.linalg.matrix_rank(best) <= rank


@QUICK
@given(several(2), st.floats(0.05, 1.0), st.booleans())
def test_the_energy_asked_for_is_kept_in_every_module(
    given_: tuple[list[dict[str, Any]], list[float]], energy: float, patterns: bool
) -> None:
    """--energy holds in every module, and with --keep-patterns no rank is larger than needed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        report = loratool.combine(
            sources, folder / "out", weights=weights, energy=energy, keep_patterns=patterns,
            dtype="float32", threads=1,
        )  # fmt: skip
        for module in report.modules:
            assert module.kept is not None
            assert module.kept >= energy * (1 - 1e-9)
            s = np.linalg.svd(total(sources, weights)[module.path], compute_uv=False) ** 2
            if patterns and module.rank > 1:
                assert s[: module.rank - 1].sum() < energy * s.sum() * (1 + 1e-6)
        assert report.rank == max(m.rank for m in report.modules)


def test_a_rank_for_all_is_used_by_all(tmp_path: Path, out: Path) -> None:
    """With --energy every module keeps what fits into the rank of the one that needs the most."""
    q = [np.linalg.qr(np.random.default_rng(n).standard_normal((10, 3)))[0] for n in range(4)]
    tensors: Tensors = {}
    for number, (path, values) in enumerate(((Q, [3, 3, 3]), (K, [5, 1, 0.5]))):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = (q[2 * number] * values).T.astype(np.float32)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = q[2 * number + 1].astype(np.float32)
    source = write_adapter(tmp_path / "one", tensors, {"r": 3, "lora_alpha": 3})
    report = loratool.combine(source, out, energy=0.9)
    assert [(m.rank, m.kept) for m in report.modules] == [(3, pytest.approx(1))] * 2
    assert_near(deltas(out), deltas(source), 5)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_survives_every_method(tmp_path: Path, out: Path, method: str) -> None:
    """At density 1 and weight 1 every method but iso_c gives a single adapter's own delta back."""
    source = lora(tmp_path / "one", Q, K, lora_alpha=3)
    density = 1.0 if METHODS[method].prunes else None
    report = loratool.combine(source, out, method=method, density=density)
    if method != "iso_c":
        assert_near(deltas(out), deltas(source), 100)
    for delta in deltas(out).values():
        values = np.linalg.svd(delta, compute_uv=False)
        if method == "iso_c":
            np.testing.assert_allclose(values[:4], values[0], rtol=1e-5)
        assert values[4] < 1e-5 * values[0]
    assert report.rank == 4


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.exact_sum])
def test_the_distance_from_the_sum_is_reported(two: list[Path], out: Path, method: str) -> None:
    """from_sum is ‖result − Σ‖/‖Σ‖ of the dense matrices, for every method that is no sum."""
    density = 0.6 if METHODS[method].prunes else None
    report = loratool.combine(two, out, method=method, density=density)
    wanted = total(two, [1, 1])[Q]
    far = np.linalg.norm(deltas(out)[Q] - wanted) / np.linalg.norm(wanted)
    assert report.modules[0].from_sum == pytest.approx(far, rel=1e-4)
