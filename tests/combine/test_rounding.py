"""The dtype of what combine writes, and what rounding to it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from helpers.adapters import PREFIX, WEIGHTS, Q, lora, write_adapter
from helpers.combining import total
from safetensors.numpy import load_file

import loratool
from loratool.linalg.methods import METHODS


def test_dtypes(tmp_path: Path, out: Path) -> None:
    """Inputs of one dtype keep it, mixed ones give float32, and --dtype decides."""
    full = lora(tmp_path / "full", seed=1)
    half = lora(tmp_path / "half", seed=2)
    tensors = {n: t.astype(np.float16) for n, t in load_file(half / WEIGHTS).items()}
    write_adapter(half, tensors, None)
    assert loratool.combine([half, half], tmp_path / "a").dtype == "float16"
    assert loratool.combine([half, full], tmp_path / "b").dtype == "float32"
    assert loratool.combine([half, full], tmp_path / "c", dtype="bfloat16").dtype == "bfloat16"
    found = [loratool.inspect(tmp_path / name).modules[0].dtype for name in "abc"]
    assert found == ["F16", "F32", "BF16"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_what_rounding_costs_is_reported(
    two: list[Path], out: Path, dtype: str, weight: float
) -> None:
    """`rounding` is about what half precision takes of the delta, also of one that is tiny."""
    import torch
    from safetensors.torch import load_file as load_torch

    report = loratool.combine(two, out, weights=[weight, weight], dtype=dtype)
    wanted = total(two, [weight, weight])[Q]
    b, a = (load_torch(out / WEIGHTS)[f"{PREFIX}{Q}.lora_{half}.weight"] for half in "BA")
    off = (b.to(torch.float64) @ a.to(torch.float64)).numpy() - wanted
    if dtype == "float32":
        assert report.rounding is None
    else:
        found = np.linalg.norm(off) / np.linalg.norm(wanted)
        assert report.rounding is not None
        assert 0.5 * found <= report.rounding <= 2 * found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_rounding_costs_is_true_of_every_method(
    tmp_path: Path, out: Path, method: str, dtype: str
) -> None:
    """`rounding` is the distance of what lies in the file from what was computed, also where the
    factors are far from orthogonal: here one adapter and nearly its opposite."""
    one = lora(tmp_path / "one", seed=1)
    noise = {
        name: -t + 0.01 * np.random.default_rng(5).standard_normal(t.shape).astype(np.float32)
        if "lora_B" in name else t
        for name, t in load_file(one / WEIGHTS).items()
    }  # fmt: skip
    two = write_adapter(tmp_path / "two", noise, {"r": 4})
    options: dict[str, Any] = {"density": 0.6} if METHODS[method].prunes else {}
    report = loratool.combine([one, two], out, method=method, dtype=dtype, **options)
    loratool.combine([one, two], tmp_path / "exact", method=method, dtype="float32", **options)
    exact, rounded = compared(tmp_path / "exact"), compared(out)
    off = sum(np.sum((exact[path] - rounded[path]) ** 2) for path in exact)
    size = sum(np.sum(delta**2) for delta in exact.values())
    assert report.rounding == pytest.approx(math.sqrt(off / size), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("options", [{"energy": 0.3}, {"rank": 2}, {}], ids=str)
@pytest.mark.parametrize("keep_patterns", [False, True])
@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "ties_core", "linear"])
def test_off_sum_is_that_of_the_file(
    two: list[Path], out: Path, method: str, keep_patterns: bool, options: dict[str, Any]
) -> None:
    """`from_sum` measures what was written, after the cut, per module and over all."""
    more: dict[str, Any] = {"density": 0.5} if METHODS[method].prunes else {}
    report = loratool.combine(
        two, out, method=method, keep_patterns=keep_patterns, **options, **more
    )
    exact = total(two, [1.0, 1.0])
    found = compared(out)
    (module,) = report.modules
    off = np.linalg.norm(found[module.path] - exact[module.path])
    share = off / np.linalg.norm(exact[module.path])
    assert module.from_sum == pytest.approx(share, abs=1e-5)
    assert report.from_sum == pytest.approx(share, abs=1e-5)


def compared(folder: Path) -> dict[str, np.ndarray]:
    """B·A of every module, in any dtype: what combine writes has the scale 1."""
    tensors = {
        n: t.float().numpy() for n, t in safetensors.torch.load_file(folder / WEIGHTS).items()
    }
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].astype(np.float64)
        @ a.astype(np.float64)
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }
