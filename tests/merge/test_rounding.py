"""How merged values are rounded, and how much of the small ones is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.files import ADAPTED, NORM, OTHER, lora_on, small_state
from helpers.states import merge_state, nothing
from safetensors.numpy import save_file

import loratool
from loratool.storage.tensors import BLOCK_ELEMENTS


def small_numbers(count: int = 50_000) -> np.ndarray:
    """Values over the whole range where float16 runs out, with both signs and zeros."""
    rng = np.random.default_rng(3)
    values = 10.0 ** rng.uniform(-12, 1, count) * rng.choice([-1, 1], count)
    values[::17] = 0.0
    values[1::1000] = -0.0
    edges = [2.0**-14, 2.0**-14 - 2.0**-26, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26]
    values[: len(edges)] = edges
    return values.astype(np.float32)


def lost(values: np.ndarray, rounded: np.ndarray, smallest: float) -> tuple[int, int]:
    """How many nonzero values became subnormal, and how many became zero."""
    sizes = np.abs(rounded.astype(np.float64))
    nonzero = values != 0
    subnormal = nonzero & (sizes > 0) & (sizes < smallest)
    return int(subnormal.sum()), int((nonzero & (sizes == 0)).sum())


def test_lost_small_values_of_untouched_tensors_are_counted(tmp_path: Path) -> None:
    """Subnormal and zeroed are exact for a tensor that is cast, zeros not counted."""
    values = small_numbers()
    rounded = values.astype(np.float16)
    state = {**small_state(), OTHER: torch.from_numpy(values), NORM: torch.ones(8)}
    state[ADAPTED] = torch.ones(8, 8)
    merged, report = merge_state(tmp_path, state, "float16")
    assert np.array_equal(merged[OTHER].numpy().view(np.uint16), rounded.view(np.uint16))
    wanted = lost(values, rounded, 2.0**-14)
    assert min(wanted) > 1000
    assert (report.subnormal, report.zeroed) == wanted


def test_lost_small_values_of_merged_tensors_are_counted(tmp_path: Path) -> None:
    """Subnormal and zeroed are exact for W + B·A, over several blocks."""
    columns = BLOCK_ELEMENTS // 8
    base = np.zeros((20, columns), np.float32)
    base[3:] = np.resize(small_numbers(), (17, columns))
    b = np.zeros((20, 1), np.float32)
    b[:3] = 1.0
    a = small_numbers(columns)[None]
    values = base + b * a  # exact: one of the two is zero
    rounded = values.astype(np.float16)
    lora = lora_on(tmp_path / "lora", b, a)
    merged, report = merge_state(tmp_path, {ADAPTED: torch.from_numpy(base)}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), rounded)
    assert (report.subnormal, report.zeroed) == lost(values, rounded, 2.0**-14)


def test_a_cast_that_loses_nothing_counts_nothing(tmp_path: Path) -> None:
    """Values that were as small before are not counted: float16 to float32, bfloat16 to float32,
    and copies."""
    state = {
        ADAPTED: torch.ones(8, 8),
        "half": torch.from_numpy(small_numbers()).half(),
        "brain": torch.tensor([1e-39, 1e-40, 0.0, 1.0]).bfloat16(),
        "single": torch.tensor([1e-40, 0.0, 1.0]),
    }
    _, report = merge_state(tmp_path, state, "float32")
    assert (report.subnormal, report.zeroed) == (0, 0)


def test_bfloat16_keeps_what_float16_loses(tmp_path: Path) -> None:
    """bfloat16 has float32's exponents: nothing of these values is lost in it."""
    state = {ADAPTED: torch.ones(8, 8), OTHER: torch.from_numpy(small_numbers())}
    merged, report = merge_state(tmp_path, state, "bfloat16")
    assert (report.subnormal, report.zeroed) == (0, 0)
    assert torch.equal(merged[OTHER], state[OTHER].bfloat16())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_ties_round_to_even(tmp_path: Path, dtype: str, tensor: str) -> None:
    """Values halfway between two, a little above and below, round as IEEE 754 says."""
    bits = 11 if dtype == "float16" else 8
    steps = np.arange(64, dtype=np.float64)
    ties = 1 + (steps + 0.5) * 2.0 ** (1 - bits)
    values = np.concatenate([ties, ties + 2.0**-22, ties - 2.0**-22]).astype(np.float32)
    state = {ADAPTED: torch.ones(192, 192), OTHER: torch.ones(192)}
    state[tensor].view(-1)[:192] = torch.from_numpy(values)
    merged, _ = merge_state(tmp_path, state, dtype, nothing(tmp_path / "zero", 192))
    scaled = values.astype(np.float64) * 2.0 ** (bits - 1)
    wanted = np.rint(scaled) / 2.0 ** (bits - 1)  # rint rounds ties to even
    assert np.array_equal(merged[tensor].view(-1)[:192].double().numpy(), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_float64_is_rounded_once(tmp_path: Path, dtype: str, tensor: str) -> None:
    """float64 goes to the output dtype in one step: over float32, ties would be made that are
    none, and rounded the wrong way."""
    bits = 11 if dtype == "float16" else 8
    steps = np.arange(32, dtype=np.float64)
    ties = 1 + (steps + 0.5) * 2.0 ** (1 - bits)
    values = np.concatenate([ties + 2.0**-40, ties - 2.0**-40])
    state = {ADAPTED: torch.ones(8, 8).double(), OTHER: torch.ones(64).double()}
    state[tensor].view(-1)[:] = torch.from_numpy(values)
    merged, _ = merge_state(tmp_path, state, dtype)
    wanted = np.rint(values * 2.0 ** (bits - 1)) / 2.0 ** (bits - 1)
    assert np.array_equal(merged[tensor].view(-1).double().numpy(), wanted)


def test_a_float64_base_is_computed_in_float64(tmp_path: Path) -> None:
    """W + B·A of float64 weights has float64's precision, and keeps the dtype with "base"."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((16, 12))
    b = rng.standard_normal((16, 4)).astype(np.float32)
    a = rng.standard_normal((4, 12)).astype(np.float32)
    lora = lora_on(tmp_path / "lora", b, a)
    state = {ADAPTED: torch.from_numpy(weight), OTHER: torch.from_numpy(weight) * 3}
    merged, _ = merge_state(tmp_path, state, "base", lora)
    assert merged[ADAPTED].dtype == torch.float64
    wanted = weight + b.astype(np.float64) @ a.astype(np.float64)
    assert np.abs(merged[ADAPTED].numpy() - wanted).max() < 1e-14
    assert torch.equal(merged[OTHER], state[OTHER])


def test_values_that_were_subnormal_before_are_not_counted(tmp_path: Path) -> None:
    """An adapter that changes nothing makes nothing subnormal."""
    base = small_base(tmp_path / "base")
    state = {f"{Q}.weight": np.full((6, 5), 2.0**-20, np.float16)}
    save_file(state, base / "model.safetensors")
    tensors = {k: np.zeros_like(v) for k, v in pair(Q, 6, 5).items()}
    report = loratool.merge(
        base, write_adapter(tmp_path / "adapter", tensors, {}), tmp_path / "out", dtype="base"
    )
    assert (report.subnormal, report.zeroed) == (0, 0)
    tensors = {k: np.ones_like(v) for k, v in tensors.items()}
    halved = write_adapter(tmp_path / "tiny", tensors, {"lora_alpha": 2.0**-17})
    save_file({f"{Q}.weight": np.zeros((6, 5), np.float16)}, base / "model.safetensors")
    again = loratool.merge(base, halved, tmp_path / "again", dtype="base")
    assert again.subnormal == 30
