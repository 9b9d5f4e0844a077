"""Stacks of experts in inspect: one line, the norms of all experts, those without effect."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import PREFIX, codes, pair, write_adapter
from helpers.cli import run_cli
from helpers.experts import DOWN, GATE_UP, Pairs, expert_pairs, stacks

import loratool
from loratool.adapters.reading import read_adapter

UP, DN = expert_pairs(5, 12, 8, 4), expert_pairs(5, 8, 6, 4, seed=1)


def test_norms_are_those_of_all_experts(tmp_path: Path) -> None:
    """Norms of a stack: of all deltas together, the largest, and the range over the experts."""
    report = loratool.inspect(stacks(tmp_path, UP, DN), spectrum=True)
    assert [m.path for m in report.modules] == [GATE_UP, DOWN]
    for module, pairs in zip(report.modules, (UP, DN), strict=True):
        deltas = [2.0 * b.astype(np.float64) @ a for b, a in pairs]
        values = np.array([np.linalg.svd(d, compute_uv=False)[:4] for d in deltas])
        norms = [float(np.linalg.norm(d)) for d in deltas]
        assert module.experts == 5
        assert module.shape == deltas[0].shape
        assert module.delta_norm == pytest.approx(np.linalg.norm(norms))
        assert module.expert_norms == pytest.approx((min(norms), max(norms)))
        assert module.spectral_norm == pytest.approx(values.max())
        stable = np.median((values**2).sum(1) / values[:, 0] ** 2)
        assert module.stable_rank == pytest.approx(stable)
        assert module.singular_values == pytest.approx(values.mean(0))


def without(pairs: Pairs, *numbers: int) -> Pairs:
    """The same with B = 0 for some experts."""
    return [(b * (n not in numbers), a) for n, (b, a) in enumerate(pairs)]


def test_experts_without_effect_are_counted(tmp_path: Path) -> None:
    """Experts with B = 0 are counted; where it is all of them, the stack has no effect."""
    report = loratool.inspect(stacks(tmp_path / "some", without(UP, 1, 3), DN))
    assert codes(report) == ["dead-experts"]
    assert f"{GATE_UP}: 2 of 5" in report.warnings[0].message
    assert [m.dead_experts for m in report.modules] == [2, 0]
    assert report.modules[0].expert_norms is not None
    assert report.modules[0].expert_norms[0] == 0
    idle = loratool.inspect(stacks(tmp_path / "all", UP, without(DN, *range(5))))
    assert codes(idle) == ["zero-delta"]


def test_broken_experts_are_named(tmp_path: Path) -> None:
    """NaN in one expert is a stack that is not finite; the other one keeps its norms."""
    bad = [(b * np.float32(np.nan if n == 2 else 1), a) for n, (b, a) in enumerate(UP)]
    report = loratool.inspect(stacks(tmp_path, bad, DN))
    assert codes(report) == ["not-finite"]
    assert [m.delta_norm is None for m in report.modules] == [True, False]


def test_a_stack_is_a_line(tmp_path: Path) -> None:
    """The table has one line for a stack, and one for all experts that have modules."""
    text = run_cli("inspect", stacks(tmp_path / "a", UP, DN), COLUMNS="130").stdout
    assert text.count("5 experts") == 2
    tensors: dict[str, np.ndarray] = {}
    for number in range(4):
        tensors |= pair(f"model.layers.0.mlp.experts.{number}.up_proj", 6, 8, seed=number)
    plain = write_adapter(tmp_path / "b", tensors, {"target_modules": ["up_proj"]})
    assert "experts.{0-3}" in run_cli("inspect", plain).stdout


def test_many_stacks_are_quick_to_list(tmp_path: Path) -> None:
    """The headers of 128 experts in 48 layers are those of 96 modules: no work per expert."""
    a, b = np.ones((256, 2), np.float32), np.ones((2, 256), np.float32)
    tensors = {
        f"{PREFIX}model.layers.{layer}.mlp.experts{inner}.lora_{half}.weight": values
        for layer in range(48)
        for inner in (".base_layer", "")
        for half, values in (("A", a), ("B", b))
    }
    config = {"r": 2, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    source = write_adapter(tmp_path, tensors, config)
    read_adapter(source)
    started = time.process_time()
    assert len(read_adapter(source).modules) == 96
    assert time.process_time() - started < 0.5
