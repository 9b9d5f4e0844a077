"""The undo file does not depend on how the work was divided, and gives any base back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import ADAPTED, NORM, lora_on, small_state, write_base
from helpers.outcomes import sha256s
from helpers.undoing import quick, several_blocks
from helpers.unmerging import TORCH
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import loratool
from loratool.errors import ValueRangeError


def set_block_size(patch: pytest.MonkeyPatch, elements: int) -> None:
    patch.setattr("loratool.storage.tensors.BLOCK_ELEMENTS", elements)


def test_the_undo_file_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two or five workers write the same bytes, and any number of workers restores them."""
    set_block_size(monkeypatch, 64)
    base, adapters = several_blocks(tmp_path)
    written = []
    for threads in (1, 2, 5):
        out = tmp_path / f"out-{threads}"
        loratool.merge(base, adapters, out, reversible=True, threads=threads)
        written.append(sha256s(out))
        back = tmp_path / f"back-{threads}"
        loratool.unmerge(out, adapters, back, threads=6 - threads)
        assert sha256s(back) == sha256s(base)
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("recorded", [50, 600, 1 << 19])
def test_a_base_is_restored_in_blocks_of_any_size(
    recorded: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undo file written in blocks of one size is read in blocks of another."""
    base, adapters = several_blocks(tmp_path)
    set_block_size(monkeypatch, recorded)
    loratool.merge(base, adapters, tmp_path / "out", dtype=dtype, reversible=True)
    for restored in (24, 100, 777, 1 << 19):
        set_block_size(monkeypatch, restored)
        loratool.unmerge(tmp_path / "out", adapters, tmp_path / f"back-{restored}")
        assert sha256s(tmp_path / f"back-{restored}") == sha256s(base)


def multiply_backwards(b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product whose sums run from the last term to the first."""
    out.zero_()
    for k in reversed(range(a.shape[0])):
        out += b[:, k : k + 1] * a[k : k + 1]
    return out


def multiply_in_halves(b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product whose terms are shuffled and whose sums are taken in two parts."""
    made = torch.Generator().manual_seed(3)
    order = torch.randperm(a.shape[0], generator=made)
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    return out.copy_(b[:, one] @ a[one] + b[:, other] @ a[other])


@pytest.mark.parametrize("multiply", [multiply_backwards, multiply_in_halves])
@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_a_base_is_restored_with_another_product(
    dtype: str, multiply: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library for matrices that adds up in another order gives the base back all the same."""
    base = write_base(tmp_path / "base", small_state(64, TORCH[dtype]))
    rng = np.random.default_rng(1)
    lora = lora_on(tmp_path / "lora", rng.standard_normal((64, 37)), rng.standard_normal((37, 64)))
    loratool.merge(base, lora, tmp_path / "out", dtype="float32", reversible=True)
    called = []

    def product(b: torch.Tensor, a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        called.append(b.dtype)
        result: torch.Tensor = multiply(b, a, out)
        return result

    monkeypatch.setattr(torch, "mm", product)
    loratool.unmerge(tmp_path / "out", lora, tmp_path / "back")
    assert set(called) == {torch.float64}
    assert sha256s(tmp_path / "back") == sha256s(base)


@settings(quick, max_examples=80)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(1, 40),
    stored=st.sampled_from(sorted(TORCH)),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "base"]),
    size=st.integers(-9, 4),
    scale=st.integers(-12, 4),
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=3),
    dora=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(24, 1, 40, "F64", "float16", 4, 0, [0.0, -0.0], True, 0)
@example(1, 24, 1, "BF16", "bfloat16", -9, 4, [1.0], False, 1)
def test_any_base_comes_back(
    rows: int,
    columns: int,
    rank: int,
    stored: str,
    dtype: str,
    size: int,
    scale: int,
    weights: list[float],
    dora: bool,
    seed: int,
) -> None:
    """Whatever shapes, dtypes, sizes and weights: every file of the base is as it was."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int, power: int = 0) -> np.ndarray:
        return (rng.standard_normal(shape) * 10.0**power).astype(np.float32)

    path = f"base_model.model.{ADAPTED.removesuffix('.weight')}"
    state = {
        ADAPTED: torch.from_numpy(numbers(rows, columns, power=size)).to(TORCH[stored]),
        NORM: torch.from_numpy(numbers(columns, power=size)).to(TORCH[stored]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(folder / "base", state)
        adapters = []
        for i in range(len(weights)):
            tensors = {
                f"{path}.lora_A.weight": numbers(rank, columns),
                f"{path}.lora_B.weight": numbers(rows, rank, power=scale),
            }
            if dora:
                tensors[f"{path}.lora_magnitude_vector"] = np.abs(numbers(rows, power=size))
            config = {"r": rank, "lora_alpha": 3, "use_dora": dora}
            adapters.append(write_adapter(folder / f"lora-{i}", tensors, config))
        try:
            loratool.merge(
                base, adapters, folder / "out", weights=weights, dtype=dtype, reversible=True
            )
        except ValueRangeError:
            assume(False)
        loratool.unmerge(folder / "out", adapters, folder / "back")
        assert sha256s(folder / "back") == sha256s(base)
