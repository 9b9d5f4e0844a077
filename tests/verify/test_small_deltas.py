"""Deltas that rounding nearly eats are still told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import ADAPTED, load, lora_on, small_state, write_base
from helpers.verifying import DTYPES, bad, codes, written

import loratool


def small_deltas(folder: Path, ratio: float, size: int, dtype: torch.dtype) -> tuple[Path, Path]:
    """A bfloat16-sized problem: Δ has a root mean square of `ratio` units of a typical weight."""
    generator = torch.Generator().manual_seed(5)
    state, factors = {}, {}
    for i in range(4):
        path = f"model.layers.{i}.mlp.up_proj"
        state[f"{path}.weight"] = (torch.randn(size, size, generator=generator) * 0.02).to(dtype)
        b = torch.randn(size, 8, generator=generator) * (ratio * 0.02 * 2**-8 / math.sqrt(8))
        factors[f"base_model.model.{path}.lora_B.weight"] = b.numpy()
        a = torch.randn(8, size, generator=generator)
        factors[f"base_model.model.{path}.lora_A.weight"] = a.numpy()
    adapter = write_adapter(folder / "a", factors, {"r": 8, "lora_alpha": 8})
    return write_base(folder / "base", state), adapter


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_deltas_that_bfloat16_nearly_eats_are_still_told(
    ratio: float, base_dtype: str, tmp_path: Path
) -> None:
    """With deltas of a tenth of a unit, merged, not merged and merged twice are three findings."""
    base, adapter = small_deltas(tmp_path, ratio, 128, DTYPES[base_dtype])
    expected = {"1": "once", "2": "weight", "-1": "weight", "1.5": "weight"}
    for weight, code in expected.items():
        out = tmp_path / f"out{weight}"
        loratool.merge(base, adapter, out, weights=[float(weight)], dtype="bfloat16")
        report = loratool.verify(out, base, adapter)
        assert codes(report) == {code: 4}, weight
        assert report.verdict == ("yes" if weight == "1" else "no")
    cast = {n: v.bfloat16() for n, v in load(base).items()}
    report = loratool.verify(written(tmp_path / "cast", cast, base), base, adapter)
    assert codes(report) == {"not-merged": 4}
    assert report.summary == ["all 4 modules were never merged"]


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_small_modules_with_small_deltas_are_still_told(
    ratio: float, size: int, tmp_path: Path
) -> None:
    """What was never merged is no merge, also where few values could tell."""
    base, adapter = small_deltas(tmp_path, ratio, size, torch.float32)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    state = {n: v.bfloat16() for n, v in load(base).items()}
    right = load(tmp_path / "out")
    unlike = {n for n in state if not torch.equal(state[n], right[n])}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == dict.fromkeys(unlike, "not-merged")


def test_delta_that_bfloat16_eats_whole_is_merged_and_lost(tmp_path: Path) -> None:
    """Where rounding leaves nothing of a delta, the base is the right result, and all is lost."""
    state = {**small_state(32), ADAPTED: torch.ones(32, 32)}
    base = write_base(tmp_path / "base", state)
    rng = np.random.default_rng(5)
    adapter = lora_on(
        tmp_path / "a", rng.uniform(-1, 1, (32, 1)) * 1e-3, rng.uniform(-1, 1, (1, 32))
    )
    loratool.merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    assert torch.equal(load(tmp_path / "out")[ADAPTED], torch.ones(32, 32).bfloat16())
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert (report.verdict, codes(report)) == ("yes", {"once": 1})
    assert report.lost == pytest.approx(1.0)
    assert report.findings[0].applied == pytest.approx(0.0)
    json.dumps(report.to_dict(), allow_nan=False)


def test_tiny_delta_in_float32_is_told_from_none(tmp_path: Path) -> None:
    """In float32 a delta of a few units in the last place is there or is not there."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(5)
    b, a = rng.standard_normal((64, 2)) * 5e-7, rng.standard_normal((2, 64))
    adapter = lora_on(tmp_path / "a", b, a)
    loratool.merge(base, adapter, tmp_path / "out", dtype="float32")
    assert loratool.verify(tmp_path / "out", base, adapter).verdict == "yes"
    report = loratool.verify(base, base, adapter)
    assert bad(report) == {ADAPTED: "not-merged"}


@pytest.mark.parametrize(("weight", "verdict"), [(0, "no"), (1, "yes"), (-1, "no"), (5, "no")])
def test_a_delta_of_the_size_of_float32_noise_is_told(
    weight: float, verdict: str, tmp_path: Path
) -> None:
    """Where each value alone could be another order of the sum, the applied weight decides."""
    rng = np.random.default_rng(0)
    weights = 0.02 + 0.02 * torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    base = write_base(tmp_path / "base", {ADAPTED: weights})
    b, a = rng.standard_normal((256, 4)), 3e-9 * rng.standard_normal((4, 256))
    lora = lora_on(tmp_path / "lora", b, a)
    x = weights.double() + weight * torch.from_numpy(b.astype(np.float32) @ a.astype(np.float32))
    merged = write_base(tmp_path / "m", {ADAPTED: x.float()})
    assert loratool.verify(merged, base, lora).verdict == verdict
