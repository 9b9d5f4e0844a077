"""Factors as they are encoded: torch's rounding, row by row, and refused where they overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.matrices import draw

from loratool.adapters.factorfile import factor_bytes
from loratool.errors import ValueRangeError
from loratool.storage.tensors import as_bytes

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def awkward() -> np.ndarray:
    """float32 numbers at and beside ties, at both ends of every range, and random bits."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    one = np.arange(0x3F80_0000, 0x3F84_0000, 0x40, np.uint32).view(np.float32)  # 1 … 1.03
    around = np.array([
        65504, 65519, 65519.996, 65520, 65521, 65536, 1e30, 3.3895314e38, 3.3961775e38,
        3.3961776e38, 3.4028235e38, np.inf, 0.0,
        2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 2.0**-26, 3 * 2.0**-25, 5 * 2.0**-25, 2.0**-126,
        2.0**-127, 2.0**-133, 2.0**-134, 3 * 2.0**-134, 5 * 2.0**-134, 2.0**-149, 3 * 2.0**-149,
        1.0009766, 1.00048828125, 1.00146484375, 1.00390625, 1.01171875,
    ], np.float32)  # fmt: skip
    with np.errstate(over="ignore", under="ignore"):
        near = np.concatenate([around, np.nextafter(around, 0), np.nextafter(around, np.inf)])
    numbers = np.concatenate([numbers[np.isfinite(numbers)], one, near])
    return np.concatenate([numbers, -numbers])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    """To nearest, ties to even, with subnormals, signed zeros and overflow to infinity."""
    values = awkward()
    wanted = torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy()
    with np.errstate(all="raise"):
        found = as_bytes(values, dtype)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_float64_and_strides(dtype: str) -> None:
    """float64 values, transposed, sliced or none at all, come in row-major order."""
    values = np.random.default_rng(0).standard_normal((5, 8))
    for array in (values, values.T, values[::2, ::-3], values[:0], values.astype(np.float16)):
        # torch's own way from float64 goes through float32 as well, but for F64.
        plain = torch.from_numpy(np.ascontiguousarray(array))
        wanted = plain.to(TORCH[dtype]).flatten().view(torch.uint8).numpy()
        assert np.array_equal(as_bytes(array, dtype), wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_encoded_factors_are_rows(dtype: str) -> None:
    """`a` and then `b` transposed, so that each rank is a run of both."""
    b, a = draw(7, 5, 3, dtype=np.float64)
    wanted = [torch.from_numpy(x).to(TORCH[dtype]).flatten() for x in (a, b.T.copy())]
    found = factor_bytes("layer.q", b, a, dtype)
    assert np.array_equal(found, torch.cat(wanted).view(torch.uint8).numpy())
    assert factor_bytes("layer.q", b[:, :0], a[:0], dtype).size == 0


@pytest.mark.parametrize(
    ("dtype", "most", "less"),
    [("F16", 65520.0, 65519.9), ("BF16", 3.3962e38, 3.3961e38), ("F32", 3.41e38, 3.4028234e38)],
)
@pytest.mark.parametrize("half", ["A", "B"])
def test_overflow_is_refused_where_it_would_round_to_infinity(
    dtype: str, most: float, less: float, half: str
) -> None:
    """Values that still round to the largest number pass; larger ones and NaN are refused."""
    for value, fits in ((less, True), (-less, True), (most, False), (-most, False)):
        b, a = draw(7, 5, 3, dtype=np.float64)
        (a if half == "A" else b)[1, 2] = value
        if fits:
            raw = torch.from_numpy(factor_bytes("layer.q", b, a, dtype)).view(TORCH[dtype])
            assert torch.isfinite(raw).all()
        else:
            with pytest.raises(ValueRangeError, match=rf"layer\.q: lora_{half} has values up to"):
                factor_bytes("layer.q", b, a, dtype)
    b[:], a[:] = 1, 1
    (a if half == "A" else b)[0, 0] = np.nan
    with pytest.raises(ValueRangeError):
        factor_bytes("layer.q", b, a, dtype)
