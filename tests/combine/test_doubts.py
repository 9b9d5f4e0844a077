"""Results that adapters do not decide: equal singular values, tied votes, deltas that cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, WEIGHTS, K, Q, codes, deltas, lora, write_adapter
from helpers.cli import run_cli
from helpers.combining import assert_near, fails, total
from safetensors.numpy import load_file

import loratool
from loratool.errors import ValueRangeError
from loratool.linalg.methods import METHODS

ELECTING = sorted(name for name, method in METHODS.items() if method.rule.elect)
ADDING = [
    "sum",
    "svd",
    "cat",
    "dare_linear_svd",
    "magnitude_prune_svd",
    "dare_linear_core",
    "iso_c",
]


def options(method: str, density: float = 1.0) -> dict[str, Any]:
    return {"method": method, **({"density": density} if METHODS[method].prunes else {})}


def spectral(folder: Path, values: list[float], seed: int = 0, path: str = Q) -> Path:
    """An adapter of scale 1 whose delta has these singular values."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((12, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((10, len(values))))[0]
    tensors = {
        f"{PREFIX}{path}.lora_A.weight": v.T.astype(np.float32),
        f"{PREFIX}{path}.lora_B.weight": (u * values).astype(np.float32),
    }
    return write_adapter(folder, tensors, {"r": len(values), "lora_alpha": len(values)})


def rewritten(
    source: Path, folder: Path, sign: float, dtype: type = np.float32, turned: bool = True
) -> Path:
    """`sign` times the same deltas, with B·R and R⁻¹·A as factors, rounded to the dtype."""
    rng = np.random.default_rng(7)
    tensors = load_file(source / WEIGHTS)
    for name in [n for n in tensors if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].astype(np.float64), tensors[other].astype(np.float64)
        r = np.eye(len(a))
        if turned:
            r = np.linalg.qr(rng.standard_normal(r.shape))[0] * rng.uniform(0.5, 2, len(a))
        tensors[name] = (sign * np.linalg.solve(r, a)).astype(dtype)
        tensors[other] = (b @ r).astype(dtype)
    return write_adapter(folder, tensors, {})


# --- equal singular values --------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{"rank": 3}, {"energy": 0.7}, {"energy": 0.7, "keep_patterns": True}]
)
def test_a_cut_iso_c_does_not_depend_on_the_order(tmp_path: Path, cut: dict[str, Any]) -> None:
    """iso_c cuts the sum and flattens what is left, so adapters in another order give the same."""
    sources = [lora(tmp_path / str(n), Q, K, seed=n) for n in range(3)]
    report = loratool.combine(sources, tmp_path / "a", method="iso_c", **cut)
    loratool.combine(sources[::-1], tmp_path / "b", method="iso_c", **cut)
    loratool.combine(sources, tmp_path / "sum", **{**cut, "keep_patterns": True})
    loratool.combine(tmp_path / "sum", tmp_path / "c", method="iso_c")
    assert_near(deltas(tmp_path / "a"), deltas(tmp_path / "b"), 100)
    assert_near(deltas(tmp_path / "a"), deltas(tmp_path / "c"), 100)
    assert codes(report) == (["ranks-differ"] if len({m.rank for m in report.modules}) > 1 else [])
    for module in report.modules:
        s = np.linalg.svd(total(sources, [1, 1, 1])[module.path], compute_uv=False)
        kept = np.linalg.matrix_rank(deltas(tmp_path / "a")[module.path], tol=1e-3)
        assert module.kept == pytest.approx(np.sum(s[:kept] ** 2) / np.sum(s**2), rel=1e-5)
        assert module.norm == pytest.approx(s[:kept].mean() * np.sqrt(kept), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "cut", [{"rank": 5}, {"energy": 0.5}, {"max_rank": 5}, {"sv_cumulative": 0.5}, {"sv_fro": 0.7}]
)
def test_resizing_a_flat_spectrum_warns(tmp_path: Path, dtype: str, cut: dict[str, Any]) -> None:
    """Of an iso_c result all directions are equal, also after rounding: a cut is luck."""
    sources = [lora(tmp_path / str(n), Q, K, seed=n) for n in range(2)]
    loratool.combine(sources, tmp_path / "flat", method="iso_c", dtype=dtype)
    report = loratool.resize(tmp_path / "flat", tmp_path / "out", **cut)
    assert "flat-spectrum" in codes(report)
    text = next(n.message for n in report.warnings if n.code == "flat-spectrum")
    assert "2 modules" in text
    assert Q in text


@pytest.mark.parametrize("method", ["sum", "svd", "cat", "ties_svd", "iso_c"])
def test_combining_to_a_cut_among_equals_warns(tmp_path: Path, method: str) -> None:
    """The same where `combine` cuts: by --rank, and for iso_c in the spectrum of the sum."""
    flat = spectral(tmp_path / "flat", [2.0, 2.0, 2.0, 1.0])
    report = loratool.combine(flat, tmp_path / "out", rank=2, **options(method))
    assert codes(report) == ["flat-spectrum"]
    for rank in (3, 4):
        more = loratool.combine(flat, tmp_path / str(rank), rank=rank, **options(method))
        assert codes(more) == []


@pytest.mark.parametrize("rank", [1, 2, 4, 7, 8])
def test_a_cut_between_unequal_values_is_silent(tmp_path: Path, rank: int) -> None:
    """A gap of a thousandth is one; equal values that are both kept or both cut do not matter."""
    values = [4.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.999]
    source = spectral(tmp_path / "one", values)
    assert codes(loratool.resize(source, tmp_path / "out", rank=rank)) == []


def test_equal_values_that_are_next_to_nothing_are_silent(tmp_path: Path) -> None:
    """A cut among values that hold a millionth of the energy costs nothing, whatever stays."""
    source = spectral(tmp_path / "one", [1.0, 1e-3, 1e-3, 1e-3])
    assert codes(loratool.resize(source, tmp_path / "out", rank=2)) == []


def test_the_rank_of_all_modules_decides_where_a_module_is_cut(tmp_path: Path) -> None:
    """With one rank for all, a flat module that fits into it is not cut: no warning."""
    flat = spectral(tmp_path / "flat", [1.0, 1.0, 1.0])
    steep = spectral(tmp_path / "steep", [4.0, 3.0, 2.0, 1.0], path=K)
    report = loratool.combine([flat, steep], tmp_path / "a", energy=0.9)
    assert [m.rank for m in report.modules] == [3, 3]
    assert "flat-spectrum" not in codes(report)
    report = loratool.combine([flat, steep], tmp_path / "b", energy=0.6, keep_patterns=True)
    assert "flat-spectrum" in codes(report)


@pytest.mark.parametrize(
    "method", ["ties_core", "dare_linear_core", "dare_ties_core", "knots_ties"]
)
def test_a_basis_of_equal_directions_warns(tmp_path: Path, method: str) -> None:
    """A rule in a basis that may turn: the flat adapter alone gives one result of many."""
    flat = spectral(tmp_path / "flat", [2.0, 2.0, 2.0])
    report = loratool.combine(flat, tmp_path / "out", **options(method, 0.5))
    assert codes(report) == ["flat-spectrum"]
    assert "basis" in report.warnings[0].message
    plain = spectral(tmp_path / "plain", [3.0, 2.0, 1.0])
    assert codes(loratool.combine(plain, tmp_path / "b", **options(method, 0.5))) == []
    if method == "dare_linear_core":  # with nothing dropped it is the sum, in any basis
        assert codes(loratool.combine(flat, tmp_path / "c", **options(method))) == []


def test_tsv_m_warns_where_it_cuts_among_equals(tmp_path: Path) -> None:
    """TSV-M keeps min(out, in)/n directions of each adapter: 5 here, of 6 that are equal."""
    sources = [spectral(tmp_path / str(n), [1.0] * 6, seed=n) for n in range(2)]
    report = loratool.combine(sources, tmp_path / "out", method="tsv_m")
    assert codes(report) == ["flat-spectrum"]
    fewer = [spectral(tmp_path / f"f{n}", [1.0] * 5, seed=n) for n in range(2)]
    assert codes(loratool.combine(fewer, tmp_path / "b", method="tsv_m")) == []


# --- deltas that cancel -----------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ADDING, "linear", "magnitude_prune", "tsv_m"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.3]])
def test_opposite_adapters_are_refused(
    tmp_path: Path, out: Path, method: str, weights: list[float]
) -> None:
    """An adapter and its negative leave nothing, or what float64 leaves of nothing."""
    one = lora(tmp_path / "one", Q, K, seed=1)
    sources = [one, rewritten(one, tmp_path / "two", -1, turned=False)]
    fails(ValueRangeError, sources, out, "cancel", weights=weights, **options(method))


@pytest.mark.parametrize("method", ELECTING)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0]])
def test_ties_of_opposite_adapters_warns(tmp_path: Path, method: str, weights: list[float]) -> None:
    """Every vote is a tie, and the positive side of each entry is written in full."""
    one = lora(tmp_path / "one", Q, K, seed=1)
    two = rewritten(one, tmp_path / "two", -weights[1], turned=False)
    report = loratool.combine([one, two], tmp_path / "out", weights=weights, **options(method))
    assert [c for c in codes(report) if c != "same-adapter"] == ["cancelled"]
    assert "TIES" in report.warnings[-1].message
    if method == "ties_svd":
        result = loratool.combine(
            [one, two], tmp_path / "full", weights=weights, rank=10, **options(method)
        )
        assert "cancelled" in codes(result)
        found, own = deltas(tmp_path / "full"), deltas(one)
        assert_near(found, {path: np.abs(delta) for path, delta in own.items()}, 100)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", METHODS)
def test_what_rounding_leaves_is_said(tmp_path: Path, method: str, dtype: type) -> None:
    """Opposite deltas with other factors leave their rounding, of 1e-7 or 1e-3: a warning names
    the module, for every method."""
    one = lora(tmp_path / "one", Q, seed=1)
    stored = rewritten(one, tmp_path / "stored", 1, dtype, turned=False)
    other = rewritten(one, tmp_path / "other", -1, dtype)
    report = loratool.combine([stored, other], tmp_path / "out", dtype="float32", **options(method))
    assert codes(report) == ["cancelled"]
    assert Q in report.warnings[0].message
    left = np.linalg.norm(deltas(tmp_path / "out")[Q]) / np.linalg.norm(deltas(one)[Q])
    assert ("is noise" in report.warnings[0].message) == (left < 3e-3)


def test_only_the_modules_that_cancel_are_named(tmp_path: Path, out: Path) -> None:
    """One module cancels, the other does not; a difference of a thousandth of float32 deltas is
    one, and weights of one sign cannot cancel copies."""
    one = lora(tmp_path / "one", Q, K, seed=1)
    tensors = load_file(rewritten(one, tmp_path / "two", -1) / WEIGHTS)
    tensors[f"{PREFIX}{K}.lora_A.weight"] *= np.float32(1.001)
    two = write_adapter(tmp_path / "two", tensors, {})
    report = loratool.combine([one, two], out)
    assert codes(report) == ["cancelled"]
    assert "1 module " in report.warnings[0].message
    assert Q in report.warnings[0].message
    assert codes(loratool.combine([one, two], tmp_path / "b", weights=[1, -1])) == []


# --- tied votes -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ELECTING)
def test_frequency_of_two_adapters_warns(tmp_path: Path, two: list[Path], method: str) -> None:
    """Of two adapters that differ in sign the positive one wins; of three there is a majority."""
    how = {"majority_sign_method": "frequency"}
    report = loratool.combine(two, tmp_path / "a", **how, **options(method))
    assert codes(report) == ["sign-ties"]
    assert Q in report.warnings[0].message
    assert codes(loratool.combine(two, tmp_path / "b", **options(method))) == []
    three = [*two, lora(tmp_path / "in" / "three", seed=3)]
    assert codes(loratool.combine(three, tmp_path / "c", **how, **options(method))) == []
    four = [*three, lora(tmp_path / "in" / "four", seed=4)]
    assert codes(loratool.combine(four, tmp_path / "d", **how, **options(method))) == ["sign-ties"]


def test_frequency_of_two_takes_the_positive_one(tmp_path: Path, two: list[Path]) -> None:
    """Where the signs differ the positive value is written, however small, as in PEFT."""
    loratool.combine(
        two, tmp_path / "a", majority_sign_method="frequency", rank=10, **options("ties_svd")
    )
    one, other = (deltas(folder)[Q] for folder in two)
    wanted = np.where(one * other > 0, (one + other) / 2, np.maximum(one, other))
    assert_near(deltas(tmp_path / "a"), {Q: wanted}, 100)


# --- on the command line ----------------------------------------------------------------------


def test_the_command_says_so(tmp_path: Path, two: list[Path]) -> None:
    """The warnings are on stderr, and the codes in loratool.json."""
    out = tmp_path / "out"
    done = run_cli(
        "combine", *map(str, two), "--method", "ties_svd", "--density", "0.5",
        "--majority-sign-method", "frequency", "-o", str(out),
    )  # fmt: skip
    assert done.exit_code == 0
    assert "the vote on signs is a tie" in " ".join(done.stderr.split())
    assert '"sign-ties"' in (out / "loratool.json").read_text()
