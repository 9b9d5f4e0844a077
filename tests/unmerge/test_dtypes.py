"""Every pair of dtypes comes back, packed ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.files import ADAPTED, load, raw_bytes, small_lora, small_state, write_base
from helpers.outcomes import sha256s
from helpers.states import mixed
from helpers.unmerging import TORCH, all_kinds, all_kinds_lora, comes_back

import loratool
from loratool.storage.header import build_header


@pytest.mark.parametrize("kinds", ["plain", "dora", "chained"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("stored", TORCH)
def test_every_pair_of_dtypes_comes_back(
    stored: str, dtype: str, kinds: str, tmp_path: Path
) -> None:
    """From every dtype to every other and back, with one adapter and with two."""
    base = write_base(tmp_path / "base", all_kinds(TORCH[stored]))
    wanted = {"plain": [False], "dora": [True], "chained": [True, False, True]}[kinds]
    adapters = [all_kinds_lora(tmp_path / f"lora-{i}", d) for i, d in enumerate(wanted)]
    report = comes_back(base, adapters, tmp_path, dtype=dtype)
    assert report.tensors == len(load(base))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_a_base_of_many_dtypes_comes_back(dtype: str, tmp_path: Path) -> None:
    """Tensors of unlike dtypes in one file, which the merge puts into another order, come back
    in theirs."""
    base = write_base(tmp_path / "base", mixed())
    comes_back(base, small_lora(tmp_path / "lora"), tmp_path, dtype=dtype)


def test_packed_dtypes_come_back(tmp_path: Path) -> None:
    """Elements of less than a byte are copied there and back."""
    table = [
        ("table.f4", "F4", (6, 4)), ("table.f6", "F6_E3M2", (8,)), ("table.f8", "F8_E4M3", (5,)),
        ("table.e8", "F8_E8M0", (3,)), (ADAPTED, "F32", (8, 8)),
    ]  # fmt: skip
    base = write_base(tmp_path / "base", small_state())
    data = bytes(range(1, 27)) + raw_bytes(small_state()[ADAPTED])
    (base / "model.safetensors").write_bytes(build_header(table, {"format": "pt"}) + data)
    loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out", reversible=True)
    loratool.unmerge(tmp_path / "out", tmp_path / "lora", tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)
