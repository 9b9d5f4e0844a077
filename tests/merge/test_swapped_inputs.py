"""An adapter in the base's place, a base in the adapter's: each is called what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.bases import halves
from helpers.files import lora_on, small_lora, small_state, write_base
from helpers.outcomes import refused

from loratool.errors import AdapterError, BaseError, FileError, MatchError


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", *halves())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


def test_an_adapter_as_base_is_named(tmp_path: Path, lora: Path) -> None:
    """An adapter directory in the base's place is called what it is."""
    error = refused(BaseError, lora, lora, tmp_path / "out", str(lora), "adapter")
    assert "a model comes before its adapters" in error.hint


def test_an_adapter_file_as_base_is_refused(tmp_path: Path, lora: Path) -> None:
    """An adapter's weights file in the base's place is refused as not a base."""
    path = lora / "adapter_model.safetensors"
    error = refused(BaseError, path, lora, tmp_path / "out", str(path), "adapter")
    assert "a model comes before its adapters" in error.hint


@pytest.mark.parametrize("shards", [1, 2])
def test_swapped_arguments_are_named(tmp_path: Path, lora: Path, shards: int) -> None:
    """merge ADAPTER BASE says that the base comes first."""
    base = write_base(tmp_path / "base", *(halves() if shards == 2 else [small_state()]))
    error = refused(BaseError, lora, base, tmp_path / "out", "adapter")
    assert "a model comes before its adapters" in error.hint


@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_in_the_adapter_s_place_is_refused(tmp_path: Path, two: Path, shards: int) -> None:
    """merge BASE BASE says that the second is no adapter."""
    other = write_base(tmp_path / "other", *(halves() if shards == 2 else [small_state()]))
    kind = AdapterError if shards == 1 else FileError
    refused(kind, two, other, tmp_path / "out", str(other))


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, two: Path) -> None:
    """An adapter none of whose modules fit names the one it could not place."""
    lora = lora_on(tmp_path / "lora", np.ones((9, 1)), np.ones((1, 8)))
    refused(MatchError, two, lora, tmp_path / "out", "q_proj", "[9, 8]", "[8, 8]")
