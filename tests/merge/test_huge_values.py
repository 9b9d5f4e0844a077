"""Finite values of any size: each figure of a report is a number or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import Q, codes, write_adapter
from helpers.cli import run_cli
from helpers.files import write_base

import loratool
from loratool.errors import LoraToolError, UsageError, ValueRangeError

WEIGHT = f"{Q}.weight"


def base_of(folder: Path, size: float, dtype: torch.dtype = torch.float32) -> Path:
    values = torch.rand(12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {WEIGHT: (2 * values - 1).mul(size).to(dtype), "model.norm.weight": torch.ones(10)}
    return write_base(folder, state)


def adapter_of(folder: Path, b: float = 1.0, a: float = 1.0, **config: Any) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{Q}.lora_A.weight": rng.uniform(-a, a, (2, 10)).astype(np.float32),
        f"base_model.model.{Q}.lora_B.weight": rng.uniform(-b, b, (12, 2)).astype(np.float32),
    }
    return write_adapter(folder, tensors, {"r": 2, "lora_alpha": 2, **config})


#: What B, A and alpha are of, and the values of the base with their dtype.
FACTORS = [(3e38, 1.0, 2), (3e38, 3e38, 2), (1e-45, 1e-45, 2), (1.0, 1.0, 1e29), (1.0, 1.0, 1e-29),
           (1e30, 1e30, 1e29), (1e19, 1.0, 2)]  # fmt: skip
BASES = [
    (3e38, torch.float32),
    (3e38, torch.bfloat16),
    (1e308, torch.float64),
    (1e-40, torch.float32),
]


@pytest.mark.parametrize(("size", "dtype"), BASES, ids=str)
@pytest.mark.parametrize(("b", "a", "alpha"), FACTORS, ids=str)
def test_reports_are_strict_json_whatever_the_values(
    b: float, a: float, alpha: float, size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """No verb gives NaN or infinity for a figure, or breaks over one, up to the formats' limits."""
    base, one = (
        base_of(tmp_path / "b", size, dtype),
        adapter_of(tmp_path / "a", b, a, lora_alpha=alpha),
    )
    other, out = adapter_of(tmp_path / "o"), tmp_path / "out"
    verbs: list[Callable[[], Any]] = [
        lambda: loratool.inspect(one, base=base, spectrum=True),
        lambda: loratool.compare([one, other], base=base, weights=[1e29, 1e-29]),
        lambda: loratool.resize(one, out, rank=1),
        lambda: loratool.merge(base, one, out, dtype="base", overwrite=True),
        lambda: loratool.verify(base, base, one),
    ]
    for verb in verbs:
        with suppress(LoraToolError):
            json.dumps(verb().to_dict(), allow_nan=False)


@pytest.mark.parametrize(("b", "lost"), [(1e30, True), (1e-30, True)])
def test_what_rounding_took_is_known_where_squares_leave_float32(
    b: float, lost: bool, tmp_path: Path
) -> None:
    """The figure is that of the same merge with all values of a usual size."""
    shares = []
    for number, factor in enumerate((1.0, b)):
        base = base_of(tmp_path / f"b{number}", 0.0)
        adapter = adapter_of(tmp_path / f"a{number}", factor)
        report = loratool.merge(base, adapter, tmp_path / f"out{number}", dtype="bfloat16")
        shares.append(report.lost)
    usual, measured = shares
    assert measured is not None
    assert usual is not None
    assert math.isclose(usual, measured, rel_tol=0.3)
    assert 0.0005 < measured < 0.004


def test_a_merge_with_huge_values_answers_once(tmp_path: Path) -> None:
    """The command line prints its document, or a table without "nan", and the output is there."""
    base, adapter = base_of(tmp_path / "b", 1.0), adapter_of(tmp_path / "a", 3e37)
    for more in (["--json"], []):
        out = tmp_path / f"out{len(more)}"
        done = run_cli("merge", base, adapter, "-o", out, "--dtype", "bfloat16", *more)
        assert done.exit_code == 0, done.stderr
        assert "nan" not in done.stdout.lower().replace(str(tmp_path), "")
        assert (out / "model.safetensors").is_file()


def test_modules_of_a_broken_base_are_named(tmp_path: Path) -> None:
    """compare and inspect say which weights of a base hold NaN, and count nothing there."""
    base, a, b = (
        base_of(tmp_path / "b", 1.0),
        adapter_of(tmp_path / "1"),
        adapter_of(tmp_path / "2"),
    )
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    data[-100:-96] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    compared = loratool.compare([a, b], base=base)
    inspected = loratool.inspect(a, base=base)
    for report in (compared, inspected):
        found = [n for n in report.warnings if n.code == "not-finite"]
        assert [n.where for n in found] == [WEIGHT]
        json.dumps(report.to_dict(), allow_nan=False)
    assert compared.modules[0].intruders == [None, None]
    assert inspected.modules[0].relative_norm is None


@pytest.mark.parametrize(
    ("alpha", "weight", "odd"),
    [(2, 1.0, False), (2, 900.0, False), (2, 1100.0, True), (2e4, -1.0, True), (2e-7, 1.0, True),
     (2e4, 1e-3, False), (2e29, 1.0, True), (0, 1.0, False)],
)  # fmt: skip
def test_absurd_scales_are_named(alpha: float, weight: float, odd: bool, tmp_path: Path) -> None:
    """weight × alpha/r far from all that is trained with is said by every verb that applies it."""
    base, adapter = base_of(tmp_path / "b", 1.0), adapter_of(tmp_path / "a", lora_alpha=alpha)
    other = adapter_of(tmp_path / "o")
    reports: list[Any] = [
        loratool.merge(base, adapter, tmp_path / "x", weights=[weight], dry_run=True),
        loratool.combine([adapter, other], tmp_path / "x", weights=[weight, 1], dry_run=True),
    ]
    for report in reports:
        assert ("absurd-scale" in codes(report)) == odd
    assert ("absurd-scale" in codes(loratool.inspect(adapter))) == (
        not 2e-6 <= alpha <= 2000 and alpha != 0
    )


def test_a_scale_beyond_float32_is_refused(tmp_path: Path) -> None:
    """weight × scale that float32 does not hold would make infinity of every value."""
    base, adapter = base_of(tmp_path / "b", 1.0), adapter_of(tmp_path / "a", lora_alpha=2e29)
    for verb in (
        lambda: loratool.merge(base, adapter, tmp_path / "x", weights=[1e10]),
        lambda: loratool.verify(base, base, adapter, weights=[-1e10]),
    ):
        with pytest.raises(
            ValueRangeError, match="weight × scale of 1 module is more than float32"
        ):
            verb()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", ["9" * 400, "9" * 50 + "TB"])
def test_a_budget_without_bounds_is_one(size: str, tmp_path: Path) -> None:
    """A size that no number type holds means as much as there is."""
    base, tuned = base_of(tmp_path / "b", 1.0), base_of(tmp_path / "t", 2.0)
    report = loratool.extract(base, tuned, tmp_path / "out", budget=size)
    json.dumps(report.to_dict(), allow_nan=False)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    """NaN, infinity and integers beyond float64 are usage errors wherever a number is given."""
    a, out = adapter_of(tmp_path / "a"), tmp_path / "out"
    for value in (math.nan, math.inf, -math.inf):
        for verb in (
            lambda value=value: loratool.resize(a, out, energy=value),
            lambda value=value: loratool.resize(a, out, sv_ratio=value),
            lambda value=value: loratool.compare([a, a], tolerance=value),
            lambda value=value: loratool.merge(a, a, out, weights=[value]),
            lambda value=value: loratool.combine([a, a], out, method="dare_linear", density=value),
        ):
            with pytest.raises(UsageError):
                verb()
    with pytest.raises(UsageError, match="are not numbers"):
        loratool.merge(a, a, out, weights=[10**400])
    with pytest.raises(UsageError, match="density"):
        loratool.combine([a, a], out, method="dare_linear", density=1e-308)
