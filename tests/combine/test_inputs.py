"""Inputs that cannot be combined are called by their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import HEAD, PREFIX, WEIGHTS, Q, lora, pair, write_adapter
from helpers.combining import fails
from helpers.experts import DOWN, GATE_UP, expert_pairs, stacks
from helpers.permissions import permissions_that_count
from helpers.places import FIXTURES

from loratool.errors import AdapterError, FileError


def test_dora_is_refused(tmp_path: Path, out: Path) -> None:
    """DoRA has no sum of deltas: the error says why and names merge."""
    extra = {f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(12, np.float32)}
    source = lora(tmp_path / "dora", extra=extra, use_dora=True)
    error = fails(AdapterError, [source, lora(tmp_path / "one")], out, "DoRA", str(source))
    assert "loratool merge" in error.hint


def test_stacks_of_experts_are_refused(tmp_path: Path, out: Path) -> None:
    """Stacks of experts (target_parameters) are refused by name, all of them in one error."""
    source = stacks(tmp_path / "moe", expert_pairs(3, 12, 8, 4), expert_pairs(3, 8, 6, 4))
    fails(AdapterError, [source], out, "target_parameters", str(source), GATE_UP, DOWN)


def test_weights_without_their_config_are_refused(tmp_path: Path, out: Path) -> None:
    """Without adapter_config.json the scale is unknown, so nothing is combined."""
    source = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, [source], out, "no adapter_config.json", str(source))


def test_what_is_no_lora_is_refused(tmp_path: Path, out: Path) -> None:
    """A base model, and an adapter that only holds whole tensors, are called by their names."""
    assert "base model" in fails(FileError, [FIXTURES / "base"], out).message
    head = {HEAD: np.ones((3, 10), np.float32)}
    source = write_adapter(tmp_path / "head", head, {"modules_to_save": ["score"]})
    fails(AdapterError, [source], out, str(source))


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_files_are_named(two: list[Path], out: Path, length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = two[1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, two, out, str(file))


def test_a_damaged_config_is_named(two: list[Path], out: Path) -> None:
    """An adapter_config.json that is no JSON is a FileError with its path."""
    (two[1] / "adapter_config.json").write_text("{")
    fails(FileError, two, out, str(two[1] / "adapter_config.json"))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "tokenizer.json"])
def test_files_that_may_not_be_read_are_named(two: list[Path], out: Path, name: str) -> None:
    """An input without read permission is a FileError that names it, and there is no output."""
    (two[1] / "tokenizer.json").write_text("{}")
    (two[1] / name).chmod(0)
    with permissions_that_count():
        fails(FileError, two, out, str(two[1] / name))
