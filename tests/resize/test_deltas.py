"""What resized adapters compute, against dense matrices."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, K, Q, config_of, deltas, lora, write_adapter
from helpers.resizing import assert_near, of_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool

QUICK = settings(max_examples=12, deadline=None)


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small adapter of any rank and scale."""
    return {
        "rank": draw(st.integers(1, 14)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@QUICK
@given(kinds(), st.integers(0, 6))
def test_the_same_rank_and_up_and_down_change_nothing(kind: dict[str, Any], more: int) -> None:
    """Resizing to the same rank, or up and down again, keeps every product; ranks are as asked,
    but never above the width of the matrices."""
    with tempfile.TemporaryDirectory() as name:
        folder, rank = Path(name), kind["rank"]
        source = lora(folder / "one", Q, K, **kind)
        report = loratool.resize(source, folder / "same", rank=rank, threads=1)
        loratool.resize(source, folder / "up", rank=rank + more, threads=1)
        loratool.resize(folder / "up", folder / "down", rank=rank, threads=1)
        for result in ("same", "up", "down"):
            assert_near(source, folder / result)
        assert config_of(folder / "up")["r"] == min(rank + more, 10)
        assert config_of(folder / "down")["r"] == min(rank, 10)
        assert [m.kept for m in report.modules] == [pytest.approx(1)] * 2
        assert report.error < 1e-6


@QUICK
@given(kinds(), st.integers(1, 12))
def test_a_cut_is_the_best_of_its_rank(kind: dict[str, Any], rank: int) -> None:
    """The cut keeps the largest singular values; kept is 1 − error², in each module and overall."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = lora(folder / "one", Q, K, **kind)
        report = loratool.resize(source, folder / "out", rank=rank, threads=1)
        before, after = deltas(source), deltas(folder / "out")
        lost = whole = 0.0
        for module in report.modules:
            delta = before[module.path]
            off = float(np.sum((delta - after[module.path]) ** 2))
            s = np.linalg.svd(delta, compute_uv=False) ** 2
            assert off == pytest.approx(s[rank:].sum(), abs=1e-5 * s.sum())
            assert module.kept == pytest.approx(1 - off / s.sum(), abs=1e-5)
            assert module.kept == pytest.approx(1 - module.error**2, abs=1e-9)
            assert module.norm == pytest.approx(np.sqrt(s.sum()), rel=1e-6)
            lost, whole = lost + off, whole + s.sum()
        assert report.kept == pytest.approx(1 - lost / whole, abs=1e-5)
        assert report.kept == pytest.approx(1 - report.error**2, abs=1e-9)


CRITERIA: dict[str, Callable[[np.ndarray, float], float]] = {
    "energy": lambda s, t: (np.cumsum(s**2) >= t * np.sum(s**2)).argmax() + 1,
    "sv_fro": lambda s, t: (np.sqrt(np.cumsum(s**2) / np.sum(s**2)) >= t).argmax() + 1,
    "sv_cumulative": lambda s, t: (np.cumsum(s) >= t * np.sum(s)).argmax() + 1,
    "sv_ratio": lambda s, t: max(1, int(np.sum(s > s[0] * t))),
}


@QUICK
@given(
    st.sampled_from(sorted(CRITERIA)), st.floats(0.05, 0.97),
    st.lists(
        st.lists(st.floats(0.1, 10), min_size=1, max_size=6, unique=True), min_size=1, max_size=3
    ),
    st.none() | st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_criteria_are_obeyed_in_every_module(
    name: str, share: float, spectra: list[list[float]], cap: int | None, patterns: bool
) -> None:
    """Each module needs the smallest rank its criterion allows, capped by --max-rank. With
    --patterns it gets that, and without it the largest that one of them needs; then what the
    others have beyond is kept too."""
    with tempfile.TemporaryDirectory() as place:
        source = of_spectrum(Path(place) / "one", *spectra)
        value = 1 / share if name == "sv_ratio" else share
        options: dict[str, Any] = {
            name: value, "max_rank": cap, "threads": 1, "patterns": patterns,
        }  # fmt: skip
        report = loratool.resize(source, Path(place) / "out", **options)
        after = deltas(Path(place) / "out")
        sorted_spectra = [np.sort(spectrum)[::-1] for spectrum in spectra]
        allowed = [
            {min(int(CRITERIA[name](s, share * (1 + e))), cap or 99) for e in (-1e-5, 0, 1e-5)}
            for s in sorted_spectra
        ]
        if not patterns:
            allowed = [{max(ranks) for ranks in itertools.product(*allowed)}] * len(allowed)
        for module, s, ranks in zip(report.modules, sorted_spectra, allowed, strict=True):
            assert module.rank in ranks
            found = np.linalg.svd(after[module.path], compute_uv=False)[: len(s)]
            np.testing.assert_allclose(found[: module.rank], s[: module.rank], rtol=1e-4)
            assert found[module.rank :].max(initial=0) < 1e-4 * s[0]
        assert report.uniform is not patterns
        assert patterns or len({m.rank for m in report.modules}) == 1


def test_norms_are_those_of_inspect_for_attention_too(tmp_path: Path, out: Path) -> None:
    """The delta of an attention module's out_proj counts twice, in the table and in the totals."""
    rng = np.random.default_rng(0)
    names = ("attn.", "attn.base_layer.out_proj.")
    tensors = {
        f"{PREFIX}{name}lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
        for name in names
        for half, shape in (("A", (4, 8)), ("B", (24 if name == "attn." else 8, 4)))
    }
    source = write_adapter(tmp_path / "one", tensors, {"r": 4, "lora_alpha": 6})
    report = loratool.resize(source, out, rank=2)
    before = {m.path: m.delta_norm for m in loratool.inspect(source).modules}
    after = {m.path: m.delta_norm for m in loratool.inspect(out).modules}
    assert {m.path: m.norm for m in report.modules} == pytest.approx(before, rel=1e-6)
    whole = sum((before[m.path] or 0) ** 2 for m in report.modules)
    kept = sum((after[m.path] or 0) ** 2 for m in report.modules)
    assert report.kept == pytest.approx(kept / whole, rel=1e-6)
    assert report.error == pytest.approx(math.sqrt(1 - kept / whole), rel=1e-5)


@pytest.mark.parametrize("flat", ["attn.", "attn.base_layer.out_proj."])
def test_the_parts_of_an_attention_module_share_the_larger_rank(
    tmp_path: Path, out: Path, flat: str
) -> None:
    """PEFT gives in_proj and out_proj one rank; it is the one that both need for the energy."""
    tensors = {}
    for name, width in (("attn.", 24), ("attn.base_layer.out_proj.", 8)):
        size = np.ones(4) if name == flat else np.array([10, 0.1, 0.1, 0.1])
        tensors[f"{PREFIX}{name}lora_A.weight"] = np.eye(4, 8, dtype=np.float32)
        b = np.eye(width, 4) * size
        tensors[f"{PREFIX}{name}lora_B.weight"] = b.astype(np.float32)
    source = write_adapter(tmp_path / "one", tensors, {"r": 4, "lora_alpha": 4})
    report = loratool.resize(source, out, energy=0.74, patterns=True)
    assert [m.rank for m in report.modules] == [3, 3]
    assert min(m.kept or 0 for m in report.modules) >= 0.74
    assert config_of(out)["rank_pattern"] == {}
