"""Adapters and results that do nothing, and weights that cancel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import WEIGHTS, K, Q, codes, config_of, deltas, lora, pair, write_adapter
from helpers.cli import run_cli
from helpers.combining import assert_near, fails, holding, total
from safetensors.numpy import load_file

import loratool
from loratool.errors import ValueRangeError
from loratool.linalg.methods import METHODS


def test_a_zero_weight_leaves_an_adapter_out(tmp_path: Path, two: list[Path], out: Path) -> None:
    """Weight 0 leaves out modules, saved tensors and the name of the base, with a warning."""
    other = holding(tmp_path / "other", np.ones((3, 10)), 3, base_model_name_or_path="x/other")
    write_adapter(other, load_file(other / WEIGHTS) | pair(K, 12, 10), None)
    report = loratool.combine([*two, other], out, weights=[1, 2, 0])
    assert codes(report) == ["zero-weight"]
    assert str(other) in report.warnings[0].message
    assert report.saved == []
    assert_near(deltas(out), total(two, [1, 2]), 100)
    config = config_of(out)
    assert (config["base_model_name_or_path"], config["modules_to_save"]) == (None, None)


def test_an_adapter_that_does_nothing_changes_nothing(tmp_path: Path, out: Path) -> None:
    """An adapter with B = 0 adds nothing; a module that only it has is zero, which is said."""
    source = lora(tmp_path / "one", Q, seed=1)
    zero = lora(tmp_path / "zero", Q, K, seed=2)
    tensors = {n: t * ("lora_A" in n) for n, t in load_file(zero / WEIGHTS).items()}
    write_adapter(zero, tensors, None)
    report = loratool.combine([source, zero], out)
    assert codes(report) == ["zero-delta", "zero-adapter"]
    assert K in report.warnings[0].message
    assert [m.kept for m in report.modules] == [1.0, None]
    assert_near(deltas(out), {Q: deltas(source)[Q], K: np.zeros((12, 10))}, 10)


@pytest.mark.parametrize("method", ["sum", "linear", "iso_c", "tsv_m", "ties_svd"])
def test_adapters_that_are_all_zero_are_refused(tmp_path: Path, out: Path, method: str) -> None:
    """A result without any delta is refused, without blaming weights where nothing cancels."""
    sources = [lora(tmp_path / str(n), seed=n) for n in range(2)]
    for source in sources:
        tensors = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
        write_adapter(source, tensors, None)
    density = 0.5 if METHODS[method].prunes else None
    error = fails(ValueRangeError, sources, out, "does nothing", method=method, density=density)
    assert "cancel" not in error.message


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune_svd", "ties_core"])
def test_a_density_that_keeps_nothing_is_named(two: list[Path], out: Path, method: str) -> None:
    """Where pruning leaves no value at all, the density is blamed, not the weights."""
    error = fails(ValueRangeError, two, out, "does nothing", method=method, density=1e-6)
    assert "cancel" not in error.message
    assert "density" in error.message + error.hint


@pytest.mark.parametrize("method", ["sum", "svd", "cat", "iso_c"])
def test_weights_that_cancel_are_refused(tmp_path: Path, out: Path, method: str) -> None:
    """Copies with opposite weights leave only rounding noise: that is zero, and it is said why."""
    one, two = (lora(tmp_path / name, seed=1) for name in ("one", "two"))
    fails(ValueRangeError, [one, two], out, "cancel", method=method, weights=[0.3, -0.3])


def test_an_adapter_that_does_nothing_is_named(tmp_path: Path, out: Path) -> None:
    """One untrained adapter among others does not change the result, and a warning names it."""
    one = lora(tmp_path / "one", Q, seed=1)
    tensors = load_file(one / WEIGHTS)
    idle = write_adapter(
        tmp_path / "idle", {n: t * ("lora_A" in n) for n, t in tensors.items()}, {"r": 4}
    )
    report = loratool.combine([one, idle], out)
    assert codes(report) == ["zero-adapter"]
    assert str(idle) in report.warnings[0].message
    assert_near(deltas(out), deltas(one), 1e2)
    assert "B does nothing" in run_cli("compare", str(one), str(idle)).stdout
