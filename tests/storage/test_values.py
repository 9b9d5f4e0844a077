"""Values as they are read from a file: widening, rounding, and files that change while in use."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import CODES, header_file, random_of, raw_bytes, read_pickled
from helpers.headers import DATA, entry
from helpers.outcomes import file_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool, as_float32
from loratool.storage.values import raw_blocks, read_float32, read_raw, values_of

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern_widens_as_in_torch(dtype: torch.dtype) -> None:
    """as_float32 gives torch's bits for all 65536 patterns; a NaN need only stay NaN."""
    patterns = np.arange(65536, dtype=np.uint16)
    got = as_float32(patterns.view(np.uint8), CODES[dtype])
    wanted = torch.from_numpy(patterns.view(np.int16)).view(dtype).to(torch.float32).numpy()
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


def test_float64_rounds_to_the_nearest_float32() -> None:
    """float64 values, also far out of range, become the float32 that torch makes of them."""
    exponents = np.random.default_rng(0).uniform(-330, 308, 20_000)
    values = np.concatenate([10.0**exponents, [0.0, -0.0, 3.4028235677973366e38, 1e-46]])
    got = as_float32(values.view(np.uint8), "F64")
    wanted = torch.from_numpy(values).to(torch.float32).numpy()
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("code", ["I8", "BOOL", "F8_E4M3", "F4", "C64"])
def test_dtypes_that_are_no_plain_floats_are_not_read_as_numbers(code: str) -> None:
    """Packed and integer storage is refused as numbers instead of being misread."""
    with pytest.raises(FileError, match=code):
        as_float32(np.zeros(8, np.uint8), code)


def test_a_file_that_shrinks_while_in_use_is_a_file_error(tmp_path: Path) -> None:
    """Data that vanishes between header and reading is reported, never made up."""
    path = header_file(tmp_path / "x.safetensors", entry(), DATA)
    info = read_header(path)[0]["blocks.w"]
    path.write_bytes(path.read_bytes()[:-1])
    file_error(lambda _: read_raw(info), path, "ended 1 byte early")


def test_a_file_that_vanishes_while_in_use_is_a_file_error(tmp_path: Path) -> None:
    """A file removed between header and reading is reported as what it is: an input missing."""
    path = header_file(tmp_path / "x.safetensors", entry(), DATA)
    info = read_header(path)[0]["blocks.w"]
    path.unlink()
    file_error(lambda _: read_raw(info), path)


def test_a_view_in_a_torch_file_grows_by_zeros(tmp_path: Path) -> None:
    """A strided tensor that gets more rows reads its own ones, though the file ends after them."""
    view = torch.arange(12, dtype=torch.float32).reshape(3, 4).T
    torch.save({"x": view}, tmp_path / "x.bin")
    info = read_pickled(tmp_path / "x.bin")[0]["x"].resized(6)
    os.truncate(tmp_path / "x.bin", info.start + 12 * 4)  # as if it were the last in the file
    info = replace(info, stamp=None)
    wanted = torch.cat([view, torch.zeros(2, 3)]).numpy()
    assert np.array_equal(read_float32(info), wanted)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of any view, also one that repeats or leaps over elements."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    strides = tuple(draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape))))
    return shape, strides, draw(st.integers(0, 3))


@settings(on_files, max_examples=150)
@given(view=views(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
       cuts=st.lists(st.floats(0, 1), max_size=6))  # fmt: skip
def test_any_range_of_any_view_is_that_of_torch(
    tmp_path: Path,
    view: tuple[tuple[int, ...], tuple[int, ...], int],
    dtype: torch.dtype,
    cuts: list[float],
) -> None:
    """Whatever the strides, elements [low, high) are those that torch has there."""
    shape, strides, offset = view
    need = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
    whole = torch.arange(max(need, 1)).to(dtype).as_strided(shape, strides, offset)
    torch.save({"x": whole}, tmp_path / "x.bin")
    info = read_pickled(tmp_path / "x.bin")[0]["x"]
    wanted = np.frombuffer(raw_bytes(torch.empty(shape, dtype=dtype).copy_(whole)), np.uint8)
    places = sorted(int(cut * whole.numel()) for cut in cuts)
    with FilePool() as files:
        values = values_of(info, files)
        for low, high in pairwise([0, *places, whole.numel()]):
            got = values.bytes(low, high)
            assert np.array_equal(got, wanted[low * info.itemsize : high * info.itemsize])


def test_a_view_that_repeats_is_read_in_little_memory(tmp_path: Path) -> None:
    """Of a tensor that names one row again and again, no more is built than what is asked for."""
    row = random_of(torch.float32, 1000)
    torch.save({"x": row.expand(1900, 1000)}, tmp_path / "x.bin")  # 7.6 MB
    info = read_pickled(tmp_path / "x.bin")[0]["x"]
    tracemalloc.start()
    try:
        total = sum(float(raw.view("f4").sum(dtype=np.float64)) for raw in raw_blocks(info))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == pytest.approx(1900 * float(row.double().sum()), rel=1e-9)
    assert peak < 5_000_000
