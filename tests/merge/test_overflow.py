"""Values that the output's dtype cannot hold are counted and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import ADAPTED, NORM, OTHER, load, lora_on, small_state, write_base
from helpers.outcomes import refused
from helpers.states import TORCH, merge_state, nothing, put

import loratool
from loratool.errors import ValueRangeError


@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float64"])
def test_values_too_large_for_float16_are_refused(tmp_path: Path, tensor: str, stored: str) -> None:
    """Finite values beyond float16 are counted, and the hint names the dtypes that hold them."""
    state = small_state(dtype=TORCH[stored])
    state[tensor] = put(state[tensor], 70000.0, 1.0, -90000.0)
    base = write_base(tmp_path / "base", state)
    words = (tensor, " 2 values overflow", "65504")
    error = refused(ValueRangeError, base, nothing(tmp_path / "zero"), tmp_path / "out", *words)
    assert "bfloat16" in error.hint
    for dtype in ("bfloat16", "float32", "base"):
        loratool.merge(base, tmp_path / "zero", tmp_path / f"in-{dtype}", dtype=dtype)
        largest = load(tmp_path / f"in-{dtype}")[tensor].view(-1)[[-3, -1]].double()
        assert torch.allclose(largest, torch.tensor([70000.0, -90000.0]).double(), rtol=0.005)


@pytest.mark.parametrize("stored", ["float32", "float64"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_values_that_round_to_the_largest_float16_are_fine(
    tmp_path: Path, tensor: str, stored: str
) -> None:
    """Everything below 65520, halfway to the next step, becomes 65504, as IEEE 754 says."""
    state = small_state(dtype=TORCH[stored])
    values = [65504.0, 65505.0, 65519.99, -65519.99]
    if stored == "float64":
        values += [65519.999999999, -65519.999999999]  # 65520 as float32
    state[tensor] = put(state[tensor], *values)
    merged, _ = merge_state(tmp_path, state, "float16")
    assert merged[tensor].view(-1)[-len(values) :].abs().tolist() == [65504.0] * len(values)


@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
@pytest.mark.parametrize("value", [65520.0, -65520.0, 65521.0])
def test_values_that_round_beyond_float16_are_refused(
    tmp_path: Path, tensor: str, value: float
) -> None:
    """From 65520 on, a value would become infinite; only such values are counted."""
    state = small_state()
    state[tensor] = put(state[tensor], 65519.99, value, 65504.0)
    base = write_base(tmp_path / "base", state)
    words = (tensor, " 1 value overflows")
    refused(ValueRangeError, base, nothing(tmp_path / "zero"), tmp_path / "out", *words)


def test_an_overflow_made_by_the_adapter_is_refused(tmp_path: Path) -> None:
    """Base and adapter are in range and their sum is not: tensor and count are named."""
    base = write_base(tmp_path / "base", {**small_state(), ADAPTED: torch.full((8, 8), 60000.0)})
    b = np.zeros((8, 1))
    b[2] = b[5] = 5519.0
    fits = lora_on(tmp_path / "fits", b, np.ones((1, 8)))
    loratool.merge(base, fits, tmp_path / "fine")
    assert float(load(tmp_path / "fine")[ADAPTED].max()) == 65504.0
    lora = lora_on(tmp_path / "lora", b + (b > 0), np.ones((1, 8)))
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, " 16 values overflow")


def test_an_overflow_made_by_a_trained_bias_is_counted(tmp_path: Path) -> None:
    """A bias that the adapter (lora_bias) moves out of range is named and counted as well."""
    path = ADAPTED.removesuffix(".weight")
    factors = {
        "lora_A.weight": np.zeros((1, 8), np.float32),
        "lora_B.weight": np.zeros((8, 1), np.float32),
        "lora_B.bias": np.array([0, 600, 0, 600, 0, 0, 600, 500], np.float32),
    }
    tensors = {f"base_model.model.{path}.{leaf}": value for leaf, value in factors.items()}
    lora = write_adapter(tmp_path / "lora", tensors, {"r": 1, "lora_alpha": 1, "lora_bias": True})
    state = {**small_state(), f"{path}.bias": torch.full((8,), 65000.0)}
    base = write_base(tmp_path / "base", state)
    words = (f"{path}.bias", " 3 values overflow")
    refused(ValueRangeError, base, lora, tmp_path / "out", *words)


def test_an_adapter_may_bring_values_back_into_range(tmp_path: Path) -> None:
    """What counts is the sum: a base value out of range, lowered by the adapter, is fine."""
    state = {**small_state(), ADAPTED: torch.full((8, 8), 70000.0)}
    lora = lora_on(tmp_path / "lora", np.full((8, 1), -20000.0), np.ones((1, 8)))
    merged, _ = merge_state(tmp_path, state, "float16", lora)
    assert merged[ADAPTED].unique().tolist() == [49984.0]  # 50000 is a tie, and rounds to even


def test_values_too_large_for_bfloat16_or_float32_are_refused(tmp_path: Path) -> None:
    """The other dtypes have a range too: float64 values can leave it."""
    large = torch.tensor([1e39, 1.0], dtype=torch.float64)
    base = write_base(tmp_path / "base", {**small_state(), NORM: large})
    for dtype in ("bfloat16", "float32"):
        zero = nothing(tmp_path / dtype)
        words = (NORM, " 1 value overflows")
        refused(ValueRangeError, base, zero, tmp_path / "out", *words, dtype=dtype)
