"""Integers of 2 to 8 bits in words, as compressed-tensors packs them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dequantising import opened, same_bits, unreadable, values
from helpers.files import State

W = "model.layers.0.mlp.down_proj"


def packed(codes: torch.Tensor, bits: int, apart: bool = False) -> torch.Tensor:
    """Rows of codes as words: one long number a row, bit by bit, cut into words of 32; or each word
    by itself."""
    if apart:
        each = codes.split(32 // bits, 1)
        return torch.cat([packed(some, bits) for some in each], 1)
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << place * bits for place, code in enumerate(row))
        rows.append([number >> 32 * n & 0xFFFFFFFF for n in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def made(
    rows: int,
    columns: int,
    bits: int,
    group: int | None,
    asymmetric: bool = False,
    order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    apart: bool = False,
) -> tuple[State, torch.Tensor]:
    """A packed weight, and what it stands for, value by value."""
    random = torch.Generator().manual_seed(rows * columns * bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random)
    groups = -(-columns // (group or columns))
    scale = (torch.rand(rows, groups, generator=random) + 0.01).to(dtype)
    half = 1 << bits - 1
    zeros = torch.full((rows, groups), half)
    index = torch.arange(columns) // (group or columns)
    stored = {
        "weight_packed": packed(codes, bits, apart), "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip
    if asymmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), generator=random)
        stored["weight_zero_point"] = packed(zeros.T, bits, apart).T.contiguous()
    if order:
        index = index[torch.randperm(columns, generator=random)]
        stored["weight_g_idx"] = index.to(torch.int32)
    exact = (codes - zeros[:, index]).double() * scale.double()[:, index]
    return {f"{W}.{role}": part for role, part in stored.items()}, exact.float()


def said(*ways: tuple[int, int | None]) -> dict[str, Any]:
    """A config with a group of modules for each of (bits, values of a group)."""
    groups = {
        f"group_{place}": {"weights": {"num_bits": bits, "group_size": group, "type": "int"}}
        for place, (bits, group) in enumerate(ways)
    }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
    }  # fmt: skip


def written(*ways: tuple[int, int | None]) -> dict[str, Any]:
    """The same of a version without gaps between codes."""
    return said(*ways) | {"version": "0.20.0"}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_any_size_in_any_groups(tmp_path: Path, bits: int, asymmetric: bool) -> None:
    """Codes that straddle words, rows that end within one, groups that end short."""
    sizes = [(1, 1), (5, 33), (32, 64), (67, 100)]
    for case, (size, group) in enumerate(itertools.product(sizes, (32, 24, None))):
        stored, expected = made(*size, bits, group, asymmetric)
        base = opened(tmp_path / str(case), stored, written((bits, group)))
        assert list(base.tensors) == [f"{W}.weight"]
        assert same_bits(values(base, f"{W}.weight"), expected), (size, group)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_words_with_gaps(tmp_path: Path, bits: int, asymmetric: bool) -> None:
    """Before 0.18 a word held as many codes as fit; the version tells where their number does
    not."""
    for case, size in enumerate([(1, 1), (9, 12), (5, 33), (32, 64), (67, 100)]):
        for version in ("0.17.1", "0.18.0"):
            stored, expected = made(*size, bits, 32, asymmetric, apart=version == "0.17.1")
            settings = said((bits, 32)) | {"version": version}
            base = opened(tmp_path / f"{case}-{version}", stored, settings)
            assert same_bits(values(base, f"{W}.weight"), expected), (size, version)


def test_words_that_may_have_gaps(tmp_path: Path) -> None:
    """12 codes of 3 bits are two words either way, and nobody says which."""
    stored, _ = made(4, 12, 3, None)
    unreadable(tmp_path / "0", stored, said((3, None)), "weight_packed", "version")
    settings = said((3, None)) | {"version": ["0.17"]}
    unreadable(tmp_path / "1", stored, settings, "weight_packed", "version")


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_act_order(tmp_path: Path, asymmetric: bool) -> None:
    """Columns of a group that lie anywhere in their rows."""
    stored, expected = made(20, 96, 4, 32, asymmetric, order=True)
    found = values(opened(tmp_path / "0", stored, said((4, 32))), f"{W}.weight")
    assert same_bits(found, expected)
    # What the library fills the order with before it knows one: columns lie as they come.
    stored, expected = made(20, 96, 4, 32, asymmetric)
    stored[f"{W}.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    found = values(opened(tmp_path / "1", stored, said((4, 32))), f"{W}.weight")
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """The product is rounded once, to float32."""
    stored, expected = made(7, 40, 4, 8, dtype=dtype)
    assert same_bits(values(opened(tmp_path, stored, said((4, 8))), f"{W}.weight"), expected)


def test_zero_points_as_they_were_once_written(tmp_path: Path) -> None:
    """Older files have them unpacked: int8, without the offset."""
    stored, expected = made(6, 64, 4, 32, asymmetric=True)
    zero = stored[f"{W}.weight_zero_point"]
    codes = [[int(zero[0, g]) >> 4 * row & 15 for g in range(2)] for row in range(6)]
    stored[f"{W}.weight_zero_point"] = (torch.tensor(codes) - 8).to(torch.int8)
    assert same_bits(values(opened(tmp_path, stored, said((4, 32))), f"{W}.weight"), expected)


def test_several_ways_in_one_model(tmp_path: Path) -> None:
    """Which group of the config a module is of its shapes show."""
    stored, plain = {}, {}
    for path, (bits, group) in {"a": (4, 32), "b": (8, None), "c": (3, 16)}.items():
        parts, plain[f"{path}.weight"] = made(9, 64, bits, group)
        stored |= {name.replace(W, path): part for name, part in parts.items()}
    base = opened(tmp_path, stored, said((4, 32), (8, None), (3, 16)))
    assert base.tensors.keys() == plain.keys()
    assert all(same_bits(values(base, name), value) for name, value in plain.items())
    bits = {name: weight.stored_as.bits for name, weight in base.weights.items()}
    assert bits == {"a.weight": 4, "b.weight": 8, "c.weight": 3}


def test_without_a_config(tmp_path: Path) -> None:
    """Shapes say it all where groups divide the row."""
    stored, expected = made(5, 64, 4, 16)
    base = opened(tmp_path, stored)
    assert base.title == "INT4 in groups of 16"
    assert same_bits(values(base, f"{W}.weight"), expected)


def bad(**changes: torch.Tensor | None) -> State:
    """A good weight of 4 bits, with tensors of these roles changed or, where None, left out."""
    stored: dict[str, Any] = made(40, 96, 4, 32, asymmetric=True)[0]
    stored |= {f"{W}.{role}": value for role, value in changes.items()}
    return {name: value for name, value in stored.items() if value is not None}


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def scale_with(value: float) -> torch.Tensor:
    scale = torch.ones(40, 3)
    scale[30, 1] = value
    return scale


def order_with(value: int) -> torch.Tensor:
    order = torch.arange(96, dtype=torch.int32) // 32
    order[50] = value
    return order


MALFORMED: dict[str, tuple[State, tuple[str, ...]]] = {
    "no-codes": (bad(weight_packed=None), ("weight_packed is missing", "weight_scale")),
    "no-scale": (bad(weight_scale=None), ("weight_scale is missing", "weight_packed")),
    "no-shape": (bad(weight_shape=None), ("weight_shape is missing",)),
    "few-rows": (bad(weight_packed=words(39, 12)), ("[39, 12]", "40 rows")),
    "few-words": (bad(weight_packed=words(40, 11)), ("11 words", "96 columns", "4 bits")),
    "vector": (bad(weight_packed=words(480)), ("weight_packed",)),
    "bytes": (bad(weight_packed=torch.zeros(40, 48).to(torch.uint8)), ("BF16", "F8_E4M3")),
    "floats": (bad(weight_packed=torch.zeros(40, 12)), ("F32", "I32")),
    "other-shape": (bad(weight_shape=torch.tensor([40, 900])), ("900 columns",)),
    "huge-shape": (bad(weight_shape=torch.tensor([40, 1 << 62])), ("columns",)),
    "negative-shape": (bad(weight_shape=torch.tensor([40, -96])), ("weight_shape", "-96")),
    "no-columns": (bad(weight_shape=torch.tensor([40, 0])), ("weight_shape", "0")),
    "long-shape": (bad(weight_shape=torch.tensor([40, 96, 1])), ("weight_shape", "[3]", "[2]")),
    "shape-of-floats": (bad(weight_shape=torch.tensor([40.0, 96.0])), ("weight_shape", "F32")),
    "short-scale": (bad(weight_scale=torch.ones(40, 2)), ("[40, 2]", "[40, 3]")),
    "one-scale": (bad(weight_scale=torch.ones(1)), ("[1]", "[40, 3]")),
    "whole-scale": (bad(weight_scale=words(40, 3)), ("weight_scale", "I32")),
    "few-zeros": (bad(weight_zero_point=words(4, 3)), ("[4, 3]", "[5, 3]")),
    "zeros-of-floats": (bad(weight_zero_point=torch.zeros(5, 3)), ("zero_point", "F32")),
    "short-order": (bad(weight_g_idx=words(95)), ("[95]", "[96]")),
    "order-of-floats": (bad(weight_g_idx=torch.zeros(96)), ("weight_g_idx", "F32")),
    "high-order": (bad(weight_g_idx=order_with(3)), ("weight_g_idx", "3")),
    "low-order": (bad(weight_g_idx=order_with(-1)), ("weight_g_idx", "3")),
    "nan-scale": (bad(weight_scale=scale_with(float("nan"))), ("weight_scale", "NaN")),
    "infinite": (bad(weight_scale=scale_with(float("inf"))), ("weight_scale", "infinity")),
    "too-large": (bad(weight_scale=scale_with(3e38)), ("weight_scale", "float32")),
    "rescaled": (bad(pre_quant_scale=torch.ones(96)), ("pre_quant_scale", "rescaled")),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_number_comes_of_is_refused(tmp_path: Path, case: str) -> None:
    """One clear error that names the tensor, and no value of it."""
    stored, parts = MALFORMED[case]
    unreadable(tmp_path, stored, said((4, 32)), W, *parts)


@pytest.mark.parametrize("ways", [((4, 64),), ((8, 32),), ((3, None),)], ids=str)
def test_a_config_that_says_otherwise_is_refused(
    tmp_path: Path, ways: tuple[tuple[int, int | None], ...]
) -> None:
    """Tensors in groups of 32 with 4 bits, and a config with other ones: both are named."""
    unreadable(tmp_path, bad(), said(*ways), W, "expected" if ways[0][0] == 4 else "bits")


HOSTILE: list[Any] = [0, -5, "x", 10**30, [32], {}, 1.5, True, "32"]


@pytest.mark.parametrize("value", HOSTILE, ids=json.dumps)
@pytest.mark.parametrize("field", ["group_size", "num_bits"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    """Hostile values in the config end in one line that says where they stand."""
    settings = said((4, 32))
    settings["config_groups"]["group_0"]["weights"][field] = value
    error = unreadable(tmp_path, bad(), settings, "config_groups.group_0.weights", field)
    assert "\n" not in error.message
