"""HQQ against its definition: codes part over part, zeros and scales along either axis, and both
steps rounded in its own dtype."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import State
from helpers.laying import changed, lay, opened, refusal, text, whole

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
CODES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def hqq(
    bits: int = 4,
    shape: tuple[int, int] = (12, 20),
    group: int = 10,
    axis: int = 1,
    dtype: str = "bfloat16",
    as_float: torch.dtype | None = None,
) -> tuple[State, torch.Tensor]:
    """The tensors of one module and what they stand for."""
    made = torch.Generator().manual_seed(bits * group + axis)
    of = DTYPES[dtype]
    count = shape[0] * shape[1]
    rows, columns = (count // group, group) if axis == 1 else (group, count // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=made)
    few = (rows, 1) if axis == 1 else (1, columns)
    zero = (torch.rand(few, generator=made) * (1 << bits)).to(of)
    scale = torch.randn(few, generator=made).to(of)
    height = math.ceil(rows / CODES[bits])
    packed = torch.zeros(height, columns, dtype=torch.int64)
    for row in range(rows):
        place = bits * (CODES[bits] - 1 - row // height)
        packed[row % height] |= codes[row] << place
    stored = packed.to(torch.int32 if bits == 3 else torch.uint8)
    expected = torch.empty(rows, columns, dtype=of)
    for row in range(rows):
        for column in range(columns):
            at = (row, 0) if axis == 1 else (0, column)
            expected[row, column] = (codes[row, column].to(of) - zero[at]) * scale[at]
    small = {
        "nbits": torch.tensor(bits, dtype=torch.int32), "shape": torch.tensor(shape),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32), "packing": text(PACKINGS[bits]),
        "compute_dtype": text(f"torch.{dtype}"), "unpack_view_dtype": text("torch.uint8"),
        "view_as_float": torch.tensor(int(as_float is not None), dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "channel_wise": torch.tensor(1, dtype=torch.uint8),
        "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
    }  # fmt: skip
    stored = stored if as_float is None else stored.view(as_float)
    tensors = {"W_q": stored, "zero": zero, "scale": scale, **small}
    return {f"m.{role}": tensor for role, tensor in tensors.items()}, expected.reshape(shape)


CASES: dict[str, dict[str, Any]] = {
    "8-bit": {"bits": 8},
    "4-bit": {},
    "4-bit-axis-0": {"axis": 0},
    "4-bit-groups-over-rows": {"group": 30},
    "4-bit-axis-0-groups-over-rows": {"group": 40, "axis": 0},
    "3-bit": {"bits": 3},
    "3-bit-axis-0": {"bits": 3, "axis": 0, "group": 24},
    "3-bit-one-short": {"bits": 3, "shape": (19, 10)},
    "2-bit": {"bits": 2},
    "1-bit": {"bits": 1},
    "1-bit-axis-0": {"bits": 1, "axis": 0, "group": 8},
    "one-group": {"group": 240, "axis": 0, "bits": 8},
    "groups-of-one": {"group": 1},
    "float16": {"dtype": "float16", "bits": 8},
    "float32": {"dtype": "float32", "bits": 8},
    "as-bfloat16": {"as_float": torch.bfloat16},
    "as-float32": {"as_float": torch.float32, "group": 20, "bits": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_values(case: str, tmp_path: Path) -> None:
    """(code − zero), rounded, times scale, rounded: the library's own result, bit for bit."""
    tensors, expected = hqq(**CASES[case])
    base = opened(lay(tmp_path / "base", tensors))
    assert base.title == f"HQQ {CASES[case].get('bits', 4)} bit"
    assert list(base.tensors) == ["m.weight"]
    assert np.array_equal(whole(base, "m.weight"), expected.float().numpy())


def test_scales_are_rounded_as_they_are_loaded(tmp_path: Path) -> None:
    """The library brings scales and zeros of another dtype to the one that it computes in."""
    tensors, expected = hqq()
    tensors["m.zero"], tensors["m.scale"] = tensors["m.zero"].float(), tensors["m.scale"] * 1.001
    finer = tensors["m.scale"].float() * (1 + 2**-12)
    assert torch.equal(finer.bfloat16(), tensors["m.scale"].bfloat16())
    plain = whole(opened(lay(tmp_path / "a", tensors)), "m.weight")
    fine = whole(opened(lay(tmp_path / "b", {**tensors, "m.scale": finer})), "m.weight")
    assert np.array_equal(plain, fine)
    assert expected.shape == plain.shape


def test_one_scale_for_all(tmp_path: Path) -> None:
    """Without channels there is one zero and one scale."""
    tensors, _ = hqq()
    tensors |= {"m.zero": torch.tensor(3.0).bfloat16(), "m.scale": torch.tensor(0.5).bfloat16()}
    found = whole(opened(lay(tmp_path / "base", tensors)), "m.weight")
    assert set(np.unique(found)) <= {(code - 3) / 2 for code in range(16)}


def test_no_more_is_padded_than_needed(tmp_path: Path) -> None:
    """Ten codes of 3 bits in a word may leave up to nine over, and no more."""
    tensors, _ = hqq(3, (19, 10))
    tensors["m.W_q"] = torch.cat([tensors["m.W_q"], tensors["m.W_q"][:1]])
    refusal(lay(tmp_path / "base", tensors), "holds 30 x 10 codes of 3 bits")


U8 = torch.uint8
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no-codes": ({"W_q": None}, "its W_q is missing"),
    "no-zero": ({"zero": None}, "its zero is missing"),
    "no-scale": ({"scale": None}, "its scale is missing"),
    "no-shape": ({"shape": None}, "its shape is missing"),
    "no-axis": ({"axis": None}, "its axis is missing"),
    "no-packing": ({"packing": None}, "its packing is missing"),
    "no-dtype": ({"compute_dtype": None}, "its compute_dtype is missing"),
    "quantised-zero": ({"quant_zero": torch.tensor(1, dtype=U8)}, "are quantised themselves"),
    "zero-codes": ({"zero": None, "zero_q": torch.zeros(24, dtype=U8)}, "themselves, or lie in"),
    "offloaded": ({"zero_scale": torch.zeros(2, 24, 1)}, "(zero_scale)"),
    "shape-of-three": ({"shape": torch.tensor([2, 6, 20])}, "is no number"),
    "shape-of-one": ({"shape": torch.tensor([240])}, "its shape is [240]"),
    "shape-negative": ({"shape": torch.tensor([-12, -20])}, "its shape is [-12, -20]"),
    "shape-huge": ({"shape": torch.tensor([2**62, 4])}, "expected two sizes"),
    "shape-other": ({"shape": torch.tensor([13, 20])}, "24 x 10 codes of 4 bits, and its shape is"),
    "shape-of-floats": ({"shape": torch.tensor([12.0, 20.0])}, "is F32, expected I64"),
    "axis": ({"axis": torch.tensor(2, dtype=torch.int32)}, "its axis is 2"),
    "axis-other": ({"axis": torch.tensor(0, dtype=torch.int32)}, "m.zero is [24, 1], expected"),
    "packing": ({"packing": text("5bit_u8")}, "its packing is '5bit_u8', expected 8bit_u8 or"),
    "packing-other": ({"packing": text("2bit_u8")}, "holds 48 x 10 codes of 2 bits"),
    "packing-code": ({"packing": text("__import__('os').system('x')")}, "its packing is"),
    "packing-long": ({"packing": text("x" * 70_000)}, "too large for a description"),
    "dtype": ({"compute_dtype": text("torch.float64")}, "its compute_dtype is 'torch.float64'"),
    "dtype-code": ({"compute_dtype": text("exec('x')")}, "its compute_dtype is"),
    "codes-of-int32": ({"W_q": torch.zeros(12, 10, dtype=torch.int32)}, "is I32, expected U8"),
    "codes-flat": ({"W_q": torch.zeros(120, dtype=U8)}, "is no matrix"),
    "codes-none": ({"W_q": torch.zeros(0, 10, dtype=U8)}, "is no matrix"),
    "codes-cut": ({"W_q": torch.zeros(11, 10, dtype=U8)}, "holds 22 x 10 codes"),
    "zero-short": ({"zero": torch.zeros(23, 1)}, "m.zero is [23, 1], expected [24, 1]"),
    "zero-integer": ({"zero": torch.zeros(24, 1, dtype=U8)}, "m.zero is U8, expected F16"),
    "scale-nan": ({"scale": torch.full((24, 1), torch.nan)}, "it holds NaN"),
    "plain-too": ({"weight": torch.zeros(12, 20)}, "it has m.weight F32"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    """What does not fit, and texts that the library would evaluate, are refused."""
    changes, words = MALFORMED[case]
    tensors, _ = hqq()
    said = {"quant_method": "hqq"}
    refusal(lay(tmp_path / "base", changed(tensors, changes), said), "m", words)
