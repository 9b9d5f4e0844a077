"""The arithmetic of blocks: what must not depend on how a tensor is cut or stored."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import loratool

PATH = "transformer.h.0.attn.c_attn"


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A deadlock ends the test run with a traceback instead of hanging it."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def gpt2_base(folder: Path, weight: torch.Tensor, pickled: bool) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    state = {f"{PATH}.weight": weight}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def dora(folder: Path, out: int, width: int) -> Path:
    tensors = pair(PATH, out, width)
    magnitude = np.linspace(0.5, 2.0, out, dtype=np.float32)
    tensors[f"base_model.model.{PATH}.lora_magnitude_vector"] = magnitude
    return write_adapter(folder, tensors, {"use_dora": True})


def merged(base: Path, adapter: Path, out: Path, **options: object) -> torch.Tensor:
    loratool.merge(base, adapter, out, dtype="float32", **options)  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")[f"{PATH}.weight"]


def test_dora_on_a_strided_transposed_weight(tmp_path: Path) -> None:
    """A weight saved as a transposed view takes DoRA as its contiguous copy does, without hanging
    on the lock that both the reading and the column norms need."""
    weight = torch.randn(20, 12).t()
    adapter = dora(tmp_path / "adapter", 20, 12)
    strided = gpt2_base(tmp_path / "strided", weight, pickled=True)
    plain = gpt2_base(tmp_path / "plain", weight, pickled=False)
    one = merged(strided, adapter, tmp_path / "one")
    assert torch.equal(one, merged(plain, adapter, tmp_path / "other"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_result_does_not_depend_on_the_block_size(
    use_dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into single rows, a few rows or not at all, a matrix merges to nearly the same values:
    a wrong row offset would show at once, the order of a sum only in the last place."""
    weight = torch.randn(30, 50)
    base = gpt2_base(tmp_path / "base", weight, pickled=False)
    adapter = dora(tmp_path / "adapter", 50, 30)
    if not use_dora:
        adapter = write_adapter(tmp_path / "plain", pair(PATH, 50, 30), {})
    whole = merged(base, adapter, tmp_path / "whole")
    assert (whole - weight).abs().max() > 0.1
    for elements in (1, 50, 120, 333):
        monkeypatch.setattr("loratool.storage.tensors.BLOCK_ELEMENTS", elements)
        cut = merged(base, adapter, tmp_path / f"cut{elements}", threads=2)
        assert (cut - whole).abs().max() <= 4e-7 * whole.abs().max()


def test_power_of_two_scales_are_exact(tmp_path: Path) -> None:
    """A scale of 2 or ½ on B gives the bits of scaling the product, also where values are small."""
    torch.manual_seed(0)
    b, a = torch.randn(64, 7) * 1e-3, torch.randn(7, 96)
    for scale in (0.5, 2.0, -4.0):
        assert torch.equal(torch.mm(b * scale, a), torch.mm(b, a) * scale)


def test_written_bytes_are_those_of_the_factors(tmp_path: Path) -> None:
    """A pair of ones adds rank times scale to every element: the simplest merge there is."""
    tensors = {k: np.ones_like(v) for k, v in pair(Q, 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out")
    found = load_numpy(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"]
    assert found.dtype == np.float16
    assert (found == 1 + 4 * 2).all()
