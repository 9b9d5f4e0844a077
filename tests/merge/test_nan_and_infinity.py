"""Numbers that must not be written stop the merge with tensor, file and count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import ADAPTED, NORM, OTHER, lora_on, small_state, write_base
from helpers.outcomes import refused
from helpers.states import TORCH, put

from loratool.errors import ValueRangeError
from loratool.storage.tensors import BLOCK_ELEMENTS

BROKEN = {"nan": torch.nan, "inf": torch.inf, "minus-inf": -torch.inf}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER, NORM], ids=["adapted", "untouched", "vector"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_nan_and_infinity_in_the_base_are_refused(
    tmp_path: Path, lora: Path, stored: str, dtype: str, tensor: str, value: str
) -> None:
    """Wherever they are, merged, cast or copied: the error names tensor, file and count."""
    state = small_state(dtype=TORCH[stored])
    state[tensor] = put(state[tensor], BROKEN[value], 1.0, BROKEN[value], BROKEN[value])
    base = write_base(tmp_path / "base", state)
    file = str(base / "model.safetensors")
    refused(ValueRangeError, base, lora, tmp_path / "out", tensor, file, " 3 values", dtype=dtype)


def test_nan_in_a_late_block_is_counted_once(tmp_path: Path) -> None:
    """A tensor of several blocks is checked to its last element, and counted as a whole."""
    rows = 3 * BLOCK_ELEMENTS // 4096
    big = put(torch.zeros(rows, 4096, dtype=torch.bfloat16), torch.nan)
    big[0, 0] = torch.inf
    base = write_base(tmp_path / "base", {ADAPTED: big})
    lora = lora_on(tmp_path / "lora", np.ones((rows, 1)), np.ones((1, 4096)))
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, " 2 values", dtype="base")


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("side", ["A", "B"])
def test_nan_and_infinity_in_the_adapter_are_refused(tmp_path: Path, side: str, value: str) -> None:
    """A diverged adapter is refused with its file, tensor and count."""
    factors = {"A": np.ones((2, 8)), "B": np.ones((8, 2))}
    factors[side][1, 0] = factors[side][0, 1] = BROKEN[value]
    lora = lora_on(tmp_path / "lora", factors["B"], factors["A"])
    base = write_base(tmp_path / "base", small_state())
    words = (str(lora / "adapter_model.safetensors"), f"lora_{side}.weight: 2 of 16")
    refused(ValueRangeError, base, lora, tmp_path / "out", *words)


def test_a_weight_of_zero_does_not_hide_a_broken_adapter(tmp_path: Path) -> None:
    """Zero times infinity is not zero: the adapter is refused whatever its weight."""
    lora = lora_on(tmp_path / "lora", np.full((8, 1), np.inf), np.ones((1, 8)))
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", "lora_B", weights=[0.0])


def test_a_product_that_overflows_float32_is_refused(tmp_path: Path) -> None:
    """Finite factors whose product is not finite are refused with the tensor's name."""
    lora = lora_on(tmp_path / "lora", np.full((8, 1), 1e30), np.full((1, 8), 1e30))
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, dtype="float32")


def test_a_weight_that_overflows_is_refused(tmp_path: Path, lora: Path) -> None:
    """A finite but enormous adapter weight gives an error, not infinities on the disk."""
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, weights=[1e300])
