"""Tensors that no adapter touches are kept as they are, or cast as by torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from helpers.files import (
    ADAPTED,
    header_file,
    lora_on,
    random_of,
    raw_bytes,
    same,
    small_state,
    write_base,
)
from helpers.outcomes import assert_clean, file_error, refused
from helpers.states import TORCH, legacy_buffers, merge_state, mixed

import loratool
from loratool.errors import ValueRangeError
from loratool.storage.header import build_header
from loratool.storage.tensors import BLOCK_ELEMENTS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_legacy_buffers_are_carried_over_unchanged(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Masks of -inf and frequency tables keep dtype and bits, and are neither refused nor
    counted as lost."""
    merged, report = merge_state(tmp_path, {**small_state(), **legacy_buffers()}, dtype, lora)
    assert same({n: merged[n] for n in legacy_buffers()}, legacy_buffers())
    assert report.zeroed == 0


def test_a_real_attention_bias_is_no_legacy_buffer(tmp_path: Path) -> None:
    """`attn.bias` of another shape than a mask is a bias: cast, checked, refused with NaN."""
    name = "h.0.attn.bias"
    merged, _ = merge_state(tmp_path, {**small_state(), name: torch.ones(8)}, "float16")
    assert merged[name].dtype == torch.float16
    base = write_base(tmp_path / "broken", {**small_state(), name: torch.full((8,), torch.nan)})
    refused(ValueRangeError, base, tmp_path / "zero", tmp_path / "never", name)


@pytest.mark.parametrize("dtype", ["float16", "base"])
def test_what_is_no_float_is_copied(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Integers, bools and complex numbers keep dtype and bits, extremes included."""
    kinds = [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
        torch.uint32, torch.uint64, torch.bool, torch.complex64,
    ]  # fmt: skip
    extra = {f"buffer.{kind}": random_of(kind, 5, 3) for kind in kinds}
    extra["buffer.extremes"] = torch.tensor([-(2**63), 2**63 - 1, 0])
    merged, _ = merge_state(tmp_path, {**small_state(), **extra}, dtype, lora)
    assert same({n: merged[n] for n in extra}, extra)


def test_packed_dtypes_are_copied_or_refused(tmp_path: Path, lora: Path) -> None:
    """Every dtype of the format, also of 4 and 6 bits, comes out as it went in: the output is as
    the reference library demands, with the same bytes."""
    table = [
        ("table.f4", "F4", (6, 4)), ("table.f6", "F6_E3M2", (8,)), ("table.f6b", "F6_E2M3", (4, 2)),
        ("table.f8", "F8_E4M3", (5,)), ("table.e8", "F8_E8M0", (3,)), ("table.c", "C64", (2,)),
        (ADAPTED, "F32", (8, 8)),
    ]  # fmt: skip
    sizes = [12, 6, 6, 5, 3, 16]
    data = bytes(range(1, sum(sizes) + 1)) + raw_bytes(small_state()[ADAPTED])
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").write_bytes(build_header(table, {"format": "pt"}) + data)
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = dict(safetensors.deserialize(written))
    position = 0
    for (name, dtype, shape), size in zip(table, sizes, strict=False):
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (dtype, shape)
        assert found[name]["data"] == data[position : position + size], name
        position += size


def test_dtype_base_keeps_every_tensor_s_own(tmp_path: Path, lora: Path) -> None:
    """With "base", untouched tensors keep all bits, and the adapted one its dtype."""
    merged, _ = merge_state(tmp_path, mixed(), "base", lora)
    adapted, wanted = merged.pop(ADAPTED), mixed()
    assert (adapted.dtype, adapted.shape) == (torch.bfloat16, (8, 8))
    assert not torch.equal(adapted, wanted.pop(ADAPTED))
    assert same(merged, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_dtype_for_all_floats(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Floats of every kind, length and shape are cast as by torch; the rest is left alone."""
    merged, report = merge_state(tmp_path, mixed(), dtype, lora)
    merged.pop(ADAPTED)
    wanted = {
        name: value.to(torch.float32).to(TORCH[dtype]) if value.is_floating_point() else value
        for name, value in mixed().items()
        if name != ADAPTED
    }
    assert same(merged, wanted)
    assert report.tensors["merge"] == 1
    assert sum(report.tensors.values()) == len(mixed())


def test_the_data_of_every_tensor_is_aligned(tmp_path: Path, lora: Path) -> None:
    """Tensors lie at multiples of their element size, so that readers can map them."""
    base = write_base(tmp_path / "base", mixed())
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    from loratool.storage.header import read_header

    tensors, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert {t.start % t.itemsize for t in tensors.values()} == {0}


@pytest.mark.parametrize("width", [1, 2, 3, 5, 63, 65, 4095])
def test_odd_widths_are_merged(tmp_path: Path, width: int) -> None:
    """Rows of any length, and a last block that is not full, get their product."""
    rows = min(BLOCK_ELEMENTS // width + 7, 700)
    rng = np.random.default_rng(width)
    weight = rng.integers(-9, 9, (rows, width)).astype(np.float32)
    b = rng.integers(-3, 3, (rows, 2)).astype(np.float32)
    a = rng.integers(-3, 3, (2, width)).astype(np.float32)
    lora = lora_on(tmp_path / "lora", b, a)
    merged, _ = merge_state(tmp_path, {ADAPTED: torch.from_numpy(weight)}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), weight + b @ a)  # small integers: exact


def test_a_row_longer_than_a_block_is_merged(tmp_path: Path) -> None:
    """One row may have more elements than a block."""
    width = BLOCK_ELEMENTS + 3
    weight = torch.arange(2 * width).remainder(64).float().view(2, width)
    a = np.arange(width)[None] % 8
    lora = lora_on(tmp_path / "lora", np.array([[2.0], [-1.0]]), a)
    merged, _ = merge_state(tmp_path, {ADAPTED: weight}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), weight.numpy() + [[2.0], [-1.0]] * a)


def test_a_name_that_cannot_be_written_is_refused_first(tmp_path: Path, lora: Path) -> None:
    """A tensor name that is no text (a lone surrogate) does not surface as an encoding error."""
    base = tmp_path / "base"
    base.mkdir()
    text = build_header([(ADAPTED, "F32", (8, 8)), ("x", "U8", (1,))], {})[8:]
    data = raw_bytes(small_state()[ADAPTED]) + b"\x01"
    path = header_file(base / "model.safetensors", text.replace(b'"x"', b'"\\ud800"'), data)
    file_error(lambda _: loratool.merge(base, lora, tmp_path / "out"), path)
    assert_clean(tmp_path / "out")
