"""Values that rounding treats badly come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import (
    ADAPTED,
    NORM,
    OTHER,
    load,
    lora_on,
    random_of,
    small_lora,
    small_state,
    write_base,
)
from helpers.outcomes import sha256s
from helpers.unmerging import TORCH, codes, comes_back

import loratool


def bits16(dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
    """The values of these bit patterns, with both signs, as an 8-column matrix."""
    bits = torch.arange(low, high, dtype=torch.int32)
    both = torch.cat([bits, bits + 0x8000]).to(torch.int32)
    both = torch.where(both >= 0x8000, both - 0x10000, both).to(torch.int16)
    return both.view(dtype).reshape(-1, 8)


def wide(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).repeat(8, 1)


ZEROS = [0.0, -0.0, 0.0, -0.0, 1.0, -1.0, -0.0, 0.0]
EDGE = [65504.0, -65504.0, 65472.0, -65472.0, 65503.0, 1.0, 0.0, -0.0]
VALUES: dict[str, Callable[[], torch.Tensor]] = {
    "halves-subnormal": lambda: bits16(torch.float16, 0, 0x0400),
    "halves-all": lambda: bits16(torch.float16, 0, 0x7800),
    "brains-subnormal": lambda: bits16(torch.bfloat16, 0, 0x0080),
    "brains-around-float16": lambda: bits16(torch.bfloat16, 0x3000, 0x4700),
    "zeros-f16": lambda: wide(ZEROS, torch.float16),
    "zeros-bf16": lambda: wide(ZEROS, torch.bfloat16),
    "zeros-f32": lambda: wide(ZEROS, torch.float32),
    "zeros-f64": lambda: wide(ZEROS, torch.float64),
    "largest-halves": lambda: wide(EDGE, torch.float16),
    "edge-f32": lambda: wide([*EDGE[:-1], 65519.99], torch.float32),
    "edge-f64": lambda: wide([*EDGE[:-1], 65519.999999999], torch.float64),
    "tiny-f32": lambda: wide([1e-45, -1e-45, 1e-40, 1e-38, -1e-30, 1e-8, 6e-8, 0], torch.float32),
    "tiny-f64": lambda: wide([5e-324, -5e-324, 1e-310, 1e-99, 1e-40, 1e-8, -0.0, 0], torch.float64),
    "near-one-f64": lambda: wide([1 + k * 2.0**-52 for k in range(8)], torch.float64),
    "all-alike": lambda: torch.full((8, 8), 1 / 3, dtype=torch.float32),
}  # fmt: skip


def sized_lora(folder: Path, rows: int, size: float, path: str = ADAPTED) -> Path:
    """An adapter for a matrix of 8 columns whose delta is about `size`."""
    rng = np.random.default_rng(3)
    b = rng.standard_normal((rows, 2)).clip(-2, 2) * size / 4
    b[::3] = 0  # rows that stay as they are
    return lora_on(folder, b, rng.standard_normal((2, 8)).clip(-2, 2), path)


@pytest.mark.parametrize("name", VALUES)
def test_difficult_values_come_back(name: str, tmp_path: Path) -> None:
    """Subnormals, both zeros and values at the edges, under deltas from nothing to far larger,
    and where only the dtype changes."""
    values = VALUES[name]()
    base = write_base(
        tmp_path / "base", {ADAPTED: values, OTHER: values.clone(), NORM: torch.ones(3)}
    )
    edge = bool((values.abs() > 60000).any())
    for size in (0.0, 1e-10) if edge else (0.0, 1e-7, 0.01, 300.0):
        lora_dir = sized_lora(tmp_path / f"lora-{size}", len(values), size)
        for dtype in ("float16", "bfloat16", "float32"):
            folder = tmp_path / f"{size}-{dtype}"
            loratool.merge(base, lora_dir, folder / "out", dtype=dtype, reversible=True)
            loratool.unmerge(folder / "out", lora_dir, folder / "back")
            assert sha256s(folder / "back") == sha256s(base), (size, dtype)


@pytest.mark.parametrize("stored", TORCH)
def test_a_delta_that_swallows_the_weights_is_taken_back(stored: str, tmp_path: Path) -> None:
    """Where nothing of the weights is left in the output, the undo file holds all of it; the
    merge says that it is large."""
    state = {**small_state(64, TORCH[stored])}
    state[ADAPTED] = (state[ADAPTED].double() * 1e-4).to(TORCH[stored])
    base = write_base(tmp_path / "base", state)
    lora_dir = lora_on(tmp_path / "lora", np.full((64, 1), 192.0), np.full((1, 64), 177.0))
    report = loratool.merge(base, lora_dir, tmp_path / "out", reversible=True)
    assert len(load(tmp_path / "out")[ADAPTED].unique()) == 1
    if stored in ("F32", "F64"):  # in the others the file's own few thousand bytes outweigh it
        assert "undo-large" in codes(report)
    loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)


@pytest.mark.parametrize("dtype", ["float16", "base"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_magnitude_of_zero_is_taken_back(transposed: bool, dtype: str, tmp_path: Path) -> None:
    """DoRA rows or columns of magnitude zero, negative and tiny ones: nothing is divided by
    zero, and nothing is lost."""
    name = "model.embed_tokens.weight" if transposed else ADAPTED
    path = f"base_model.model.{name.removesuffix('.weight')}"
    rng = np.random.default_rng(2)
    magnitude = np.array([0.0, -0.0, 1e-45, -1.0, 1e-38, 1e-7, 3.0, 1e3], np.float32)
    one, other = ("lora_embedding_A", "lora_embedding_B") if transposed else (
        "lora_A.weight", "lora_B.weight")  # fmt: skip
    tensors = {
        f"{path}.{one}": rng.standard_normal((2, 8)).astype(np.float32),
        f"{path}.{other}": rng.standard_normal((8, 2)).astype(np.float32),
        f"{path}.lora_magnitude_vector": magnitude,
    }
    lora_dir = write_adapter(tmp_path / "lora", tensors, {"r": 2, "use_dora": True})
    for stored, kind in TORCH.items():
        base = write_base(tmp_path / stored / "base", {name: random_of(kind, 8, 8)})
        comes_back(base, lora_dir, tmp_path / stored, dtype=dtype)


def test_what_is_not_checked_comes_back_whatever_it_holds(tmp_path: Path) -> None:
    """NaN payloads and infinities in legacy buffers and integers keep every bit."""
    payloads = torch.tensor([0x7F800001, 0x7FC12345, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    state = {
        **small_state(),
        "model.rotary_emb.inv_freq": payloads.view(torch.float32),
        "h.0.attn.masked_bias": torch.tensor(0x7E01, dtype=torch.int16).view(torch.float16),
        "ids": torch.tensor([-(2**63), 2**63 - 1]),
    }
    comes_back(write_base(tmp_path / "base", state), small_lora(tmp_path / "lora"), tmp_path)
