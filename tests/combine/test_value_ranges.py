"""NaN, infinity and numbers too large stop combine with the tensor's name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import HEAD, PREFIX, WEIGHTS, Q, lora, write_adapter
from helpers.combining import fails, holding
from safetensors.numpy import load_file

import loratool
from loratool.errors import UsageError, ValueRangeError


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight", f"{PREFIX}{Q}.lora_B.bias", HEAD],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, out: Path, name: str, bad: float, dry_run: bool
) -> None:
    """NaN and infinity in A, B, a bias or a saved tensor stop the run with the tensor's name."""
    extra = {
        f"{PREFIX}{Q}.lora_B.bias": np.ones(12, np.float32),
        HEAD: np.ones((3, 10), np.float32),
    }
    good = lora(tmp_path / "good", seed=1)
    bad_one = lora(tmp_path / "bad", extra=extra, lora_bias=True, modules_to_save=["score"])
    tensors = load_file(bad_one / WEIGHTS)
    tensors[name].reshape(-1)[3] = bad
    write_adapter(bad_one, tensors, None)
    error = fails(ValueRangeError, [good, bad_one], out, dry_run=dry_run)
    assert name.removeprefix(PREFIX) in error.message
    assert "NaN or infinity" in error.message


def test_the_file_with_a_bad_saved_tensor_is_named(tmp_path: Path, out: Path) -> None:
    """With several adapters the message says which file holds the NaN, also in a saved tensor."""
    adapters = [
        lora(tmp_path / "good", seed=1),
        holding(tmp_path / "bad", np.full((3, 10), np.nan)),
    ]
    fails(ValueRangeError, adapters, out, str(tmp_path / "bad"))


@pytest.mark.parametrize("weight", [1e200, -1e308])
def test_absurd_weights_are_an_error_in_words(two: list[Path], out: Path, weight: float) -> None:
    """A weight whose product leaves the range of numbers is named as that: no traceback, and no
    word of weights that cancel."""
    error = fails(UsageError, two, out, "Weight", weights=[weight, 1.0], dtype="float32")
    assert "cancel" not in error.message


@pytest.mark.parametrize("dry_run", [False, True])
def test_overflow_of_the_dtype_is_refused(two: list[Path], out: Path, dry_run: bool) -> None:
    """Factors too large for float16 are refused with module and size, in a dry run too; float32
    holds them."""
    options: dict[str, Any] = {"weights": [1e12, 1.0], "dry_run": dry_run}
    error = fails(ValueRangeError, two, out, Q, "too large", dtype="float16", **options)
    assert "float32" in error.hint
    loratool.combine(two, out, dtype="float32", **options)


def test_overflow_of_a_bias_is_refused(tmp_path: Path, out: Path) -> None:
    """A summed lora_bias too large for float16 is refused, not written as infinity."""
    extra = {f"{PREFIX}{Q}.lora_B.bias": np.full(12, 5e4, np.float32)}
    source = lora(tmp_path / "one", extra=extra, lora_bias=True)
    fails(ValueRangeError, [source], out, Q, dtype="float16")


def test_overflow_of_a_mean_is_refused(tmp_path: Path, out: Path) -> None:
    """A weighted mean of saved tensors that its dtype cannot hold is refused by name."""
    heads = [np.full((3, 10), x, np.float16) for x in (6e4, -6e4)]
    sources = [holding(tmp_path / str(n), h, seed=n) for n, h in enumerate(heads)]
    fails(ValueRangeError, sources, out, "score.weight", saved="mean", weights=[1, -0.9])
