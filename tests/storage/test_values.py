"""Values as they are read from a file: widening, rounding, and files that change while in use."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import CODES, header_file
from helpers.headers import DATA, entry
from helpers.outcomes import file_error

from loratool.errors import FileError
from loratool.storage.header import read_header
from loratool.storage.tensors import as_float32
from loratool.storage.torchfile import read_pickled
from loratool.storage.values import read_float32, read_raw


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
