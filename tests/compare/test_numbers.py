"""Norms, cosines, overlaps and survival, against dense matrices."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, WEIGHTS, K, Q, Tensors, deltas, lora, write_adapter
from helpers.comparing import changed, fails
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import loratool
from loratool.errors import UsageError

QUICK = settings(max_examples=12, deadline=None)


def overlaps(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Squared cosines of the principal angles between the column spaces, by dense SVDs."""
    bases = []
    for matrix in (one, two):
        u, s, _ = np.linalg.svd(matrix)
        bases.append(u[:, : int(np.sum(s > 1e-6 * s[0]))])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small adapter of any rank and scale."""
    return {
        "rank": draw(st.integers(1, 12)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "paths": draw(st.sampled_from([(Q,), (K,), (Q, K)])),
    }


def made(folder: Path, kind: dict[str, Any]) -> Path:
    return lora(folder, *kind["paths"], **{k: v for k, v in kind.items() if k != "paths"})


weights_ = st.floats(-3, 3).filter(lambda w: abs(w) > 0.01)


@QUICK
@given(kinds(), kinds(), weights_, weights_)
def test_numbers_are_those_of_the_dense_matrices(
    first: dict[str, Any], second: dict[str, Any], v: float, w: float
) -> None:
    """Norms, cosine, ratio, distance, factor, survival and overlaps, per module and
    overall, equal what dense float64 gives."""
    with tempfile.TemporaryDirectory() as name:
        adapters = [made(Path(name) / "a", first), made(Path(name) / "b", second)]
        dense = [deltas(a) for a in adapters]
        report = loratool.compare(adapters, weights=[v, w], threads=1)
        zero = np.zeros((12, 10))
        sums = np.zeros(4)  # ⟨a,a⟩, ⟨b,b⟩, ⟨a,b⟩, ‖va+wb‖²
        shared = np.zeros(2)  # ⟨a,a⟩, ⟨b,b⟩ of the modules that both adapt
        assert {m.path for m in report.modules} == dense[0].keys() | dense[1].keys()
        for module in report.modules:
            a, b = (d.get(module.path, zero) for d in dense)
            total = v * a + w * b
            sums += [np.sum(a * a), np.sum(b * b), np.sum(a * b), np.sum(total**2)]
            # From Gram matrices: what nearly cancels is known to the root of float64's precision.
            parts = abs(v) * np.linalg.norm(a) + abs(w) * np.linalg.norm(b)
            assert module.sum_norm == pytest.approx(np.linalg.norm(total), abs=1e-7 * parts)
            (pair_,) = module.pairs
            if not a.any() or not b.any():
                assert pair_.cosine is pair_.output_overlap is pair_.input_overlap is None
                assert pair_.distance == pytest.approx(1)
                assert [n is None for n in module.norms] == [not a.any(), not b.any()]
                continue
            shared += [np.sum(a * a), np.sum(b * b)]
            size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
            cosine = np.sum(a * b) / size_a / size_b
            assert module.norms == pytest.approx([size_a, size_b], rel=1e-6)
            assert pair_.cosine == pytest.approx(cosine, abs=1e-6)
            assert pair_.ratio == pytest.approx(size_b / size_a, rel=1e-6)
            distance = np.linalg.norm(a - b) / max(size_a, size_b)
            assert pair_.distance == pytest.approx(distance, abs=1e-6)
            assert pair_.factor == pytest.approx(np.sum(a * b) / size_a**2, abs=1e-6)
            survival = [np.sum(a * total) / (v * size_a**2), np.sum(b * total) / (w * size_b**2)]
            assert module.survival == pytest.approx(survival, rel=1e-5, abs=1e-6)
            assert np.square(pair_.output_cosines or []) == pytest.approx(overlaps(a, b), abs=1e-5)
            assert np.square(pair_.input_cosines or []) == pytest.approx(
                overlaps(a.T, b.T), abs=1e-5
            )
            assert pair_.output_overlap == pytest.approx(np.mean(overlaps(a, b)), abs=1e-5)
            values = np.linalg.svd(a, compute_uv=False)[: first["rank"]]
            shares = values / values.sum()
            entropy = math.exp(-np.sum(shares * np.log(shares)))
            assert module.effective_ranks[0] == pytest.approx(entropy, rel=1e-4)
        (whole,) = report.pairs
        aa, bb, ab, both = sums
        assert report.norms == pytest.approx([math.sqrt(aa), math.sqrt(bb)], rel=1e-6)
        if shared.all():
            assert whole.cosine == pytest.approx(ab / math.sqrt(np.prod(shared)), abs=1e-6)
        else:
            assert whole.cosine is None
        assert whole.ratio == pytest.approx(math.sqrt(bb / aa), rel=1e-6)
        assert whole.factor == pytest.approx(ab / aa, abs=1e-6)
        assert report.survival == pytest.approx(
            [(v * aa + w * ab) / (v * aa), (v * ab + w * bb) / (w * bb)], rel=1e-5, abs=1e-6
        )
        apart = v * v * aa + w * w * bb
        assert report.sum_share == pytest.approx(both / apart, rel=1e-5, abs=1e-13)
        json.dumps(report.to_dict(), allow_nan=False)


@QUICK
@given(kinds(), kinds())
def test_comparing_is_symmetric(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Swapping the adapters swaps their numbers and turns the ratio over; nothing else changes."""
    with tempfile.TemporaryDirectory() as name:
        adapters = [made(Path(name) / "a", first), made(Path(name) / "b", second)]
        there = loratool.compare(adapters, threads=1)
        back = loratool.compare(adapters[::-1], threads=1)
        assert (there.verdicts, there.equal) == (back.verdicts, back.equal)
        assert there.norms == pytest.approx(back.norms[::-1])
        assert there.survival == pytest.approx(back.survival[::-1], rel=1e-9)
        one, two = there.pairs[0], back.pairs[0]
        assert one.cosine == (None if two.cosine is None else pytest.approx(two.cosine, abs=1e-12))
        assert one.distance == pytest.approx(two.distance)
        assert one.output_overlap == pytest.approx(two.output_overlap)
        assert one.input_overlap == pytest.approx(two.input_overlap)
        assert (one.ratio or 0) * (two.ratio or 0) == pytest.approx(1)


@QUICK
@given(kinds(), kinds(), st.integers(0, 3), st.booleans())
def test_factors_and_their_rank_do_not_matter(
    first: dict[str, Any], second: dict[str, Any], more: int, conventional: bool
) -> None:
    """B·G, G⁻¹·A, filled up with zeros, with another alpha or rsLoRA, is the same adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, other = made(folder / "a", first), made(folder / "b", second)
        config = json.loads((source / "adapter_config.json").read_text())
        rank = config["r"] + more
        root = math.sqrt if first["use_rslora"] else float
        scale = config["lora_alpha"] / root(config["r"])
        new_root = float if conventional else math.sqrt
        new = {"r": rank, "lora_alpha": 3, "use_rslora": not conventional}
        rng = np.random.default_rng(first["seed"])
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * rng.uniform(0.5, 2, rank)
        tensors = load_file(source / WEIGHTS)
        fresh: Tensors = {}
        for path in first["paths"]:
            names = [f"{PREFIX}{path}.lora_{half}.weight" for half in "AB"]
            a = np.pad(tensors[names[0]].astype(np.float64), [(0, more), (0, 0)])
            b = np.pad(tensors[names[1]].astype(np.float64), [(0, 0), (0, more)])
            b = b * scale / (3 / new_root(rank))
            fresh[names[0]] = (np.linalg.inv(turn) @ a).astype(np.float32)
            fresh[names[1]] = (b @ turn).astype(np.float32)
        remade = write_adapter(folder / "c", fresh, new)
        report = loratool.compare([source, remade], tolerance=1e-5, threads=1)
        assert report.equal, report.differing
        assert report.verdicts == ["same"]
        one = loratool.compare([source, other], threads=1)
        two = loratool.compare([remade, other], threads=1)
        assert one.verdicts == two.verdicts
        assert one.pairs[0].distance == pytest.approx(two.pairs[0].distance, abs=1e-5)
        for left, right in zip(one.modules, two.modules, strict=True):
            assert left.path == right.path
            if left.pairs[0].output_overlap is not None:
                assert np.square(left.pairs[0].output_cosines or []) == pytest.approx(
                    np.square(right.pairs[0].output_cosines or []), abs=1e-4
                )
                assert np.square(left.pairs[0].input_cosines or []) == pytest.approx(
                    np.square(right.pairs[0].input_cosines or []), abs=1e-4
                )


@QUICK
@given(kinds(), st.floats(-5, 5).filter(lambda c: abs(c) > 0.01 and abs(c - 1) > 0.01))
def test_a_multiple_is_found_with_its_factor(kind: dict[str, Any], factor: float) -> None:
    """c·A is "scaled", for negative c too, and the report has c."""
    with tempfile.TemporaryDirectory() as name:
        source = made(Path(name) / "a", kind)
        tensors = {n: t * np.float32(factor if "lora_B" in n else 1)
                   for n, t in load_file(source / WEIGHTS).items()}  # fmt: skip
        multiple = changed(source, Path(name) / "b", tensors)
        report = loratool.compare([source, multiple], threads=1)
        assert report.verdicts == ["scaled"]
        assert report.pairs[0].factor == pytest.approx(factor, rel=1e-5)
        assert report.pairs[0].cosine == pytest.approx(math.copysign(1, factor))
        assert not report.equal


def test_selections(adapter: Path) -> None:
    """--layer and --include narrow the modules and all overall numbers; wrong ones are refused."""
    every = loratool.compare([adapter, adapter])
    assert len(every.modules) == 28
    some = loratool.compare([adapter, adapter], layers="1-2", include=["self_attn.*"])
    assert len(some.modules) == 8
    assert {m.path.split(".")[2] for m in some.modules} == {"1", "2"}
    assert all(".self_attn." in m.path for m in some.modules)
    norm = math.sqrt(sum((m.norms[0] or 0) ** 2 for m in some.modules))
    assert some.norms[0] == pytest.approx(norm)
    assert some.norms[0] < every.norms[0]
    fails(UsageError, [adapter, adapter], "No module matches", layers="9")
    fails(UsageError, [adapter, adapter], "'3-1'", layers="3-1")
    fails(UsageError, [adapter, adapter], "nothing.*", include=["nothing.*"])


def test_norms_are_those_of_inspect(tmp_path: Path, adapter: Path) -> None:
    """compare, inspect and resize name the same ‖ΔW‖."""
    compared = {m.path: m.norms[0] for m in loratool.compare([adapter, adapter]).modules}
    inspected = {m.path: m.delta_norm for m in loratool.inspect(adapter).modules}
    resized = loratool.resize(adapter, tmp_path / "x", rank=8, dry_run=True).modules
    assert compared == pytest.approx(inspected, rel=1e-9)
    assert compared == pytest.approx({m.path: m.norm for m in resized}, rel=1e-9)


def test_threads_do_not_matter(tmp_path: Path) -> None:
    """The report is the same to the last bit with 1 and with 3 threads."""
    paths = [f"model.layers.{n}.q_proj" for n in range(8)]
    adapters = [lora(tmp_path / str(n), *paths, seed=n) for n in range(2)]
    reports = [loratool.compare(adapters, threads=n).to_dict() for n in (1, 3)]
    assert reports[0] == reports[1]


def test_the_expectation_of_chance_is_there(tmp_path: Path) -> None:
    """Random spaces of rank 4 in widths 12 and 10 overlap by about a third; the report says so."""
    report = loratool.compare([lora(tmp_path / str(n), Q, seed=n) for n in range(2)])
    (pair_,) = report.modules[0].pairs
    assert pair_.output_chance == pytest.approx(4 / 12)
    assert pair_.input_chance == pytest.approx(4 / 10)
