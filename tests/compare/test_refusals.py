"""What compare cannot compare is named, and inputs are not touched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import HEAD, PREFIX, WEIGHTS, K, Q, lora, pair, write_adapter
from helpers.comparing import fails
from helpers.outcomes import assert_clear, sha256s
from helpers.permissions import permissions_that_count
from helpers.places import FIXTURES
from safetensors.numpy import load_file

import loratool
from loratool.errors import (
    AdapterError,
    FileError,
    LoraToolError,
    MatchError,
    UsageError,
    ValueRangeError,
)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, 1.0, 2.0, 1e-9, math.nan, math.inf])
def test_tolerances_out_of_range_are_refused(two: list[Path], tolerance: float) -> None:
    """A tolerance that no comparison could meet or fail is a UsageError that quotes it."""
    error = fails(UsageError, two, f"--tolerance {tolerance:g}", tolerance=tolerance)
    assert error.exit_code == 2


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_must_be_numbers(two: list[Path], weight: float) -> None:
    """Weights that are not finite are refused."""
    fails(UsageError, two, "finite", weights=[1, weight])


@pytest.mark.parametrize("weight", [1e200, -1e308])
def test_absurd_weights_are_an_error_in_words(two: list[Path], weight: float) -> None:
    """A weight whose square leaves the range of numbers is refused, or the answer is finite."""
    try:
        report = loratool.compare(two, weights=[weight, 1])
    except LoraToolError as error:
        assert_clear(error)
    else:
        json.dumps(report.to_dict(), allow_nan=False)


def test_fewer_than_two_adapters(two: list[Path]) -> None:
    """None, one, and an empty path among them, are UsageErrors."""
    fails(UsageError, [], "No adapter")
    fails(UsageError, two[0], "One adapter")
    fails(UsageError, [two[0], ""], "empty")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("half", "AB")
def test_factors_that_are_no_numbers_are_named(two: list[Path], bad: float, half: str) -> None:
    """NaN and infinity in a factor stop the comparison with file and tensor."""
    tensors = load_file(two[1] / WEIGHTS)
    name = f"{PREFIX}{K}.lora_{half}.weight"
    tensors[name].reshape(-1)[2] = bad
    write_adapter(two[1], tensors, None)
    fails(ValueRangeError, two, name, str(two[1]), "NaN or infinity")


def test_a_saved_tensor_with_nan_equals_nothing(tmp_path: Path) -> None:
    """NaN in a saved tensor is a difference or an error, never equality."""
    head = np.ones((3, 10), np.float32)
    head[0, 0] = np.nan
    adapters = [lora(tmp_path / n, extra={HEAD: head}, modules_to_save=["score"]) for n in "ab"]
    try:
        report = loratool.compare(adapters)
    except ValueRangeError as error:
        assert_clear(error, "score.weight")
    else:
        assert not report.equal


def test_different_shapes_are_different_bases(tmp_path: Path) -> None:
    """Modules of one name and different shapes are a MatchError with both shapes."""
    adapters = [lora(tmp_path / "small"), write_adapter(tmp_path / "large", pair(Q, 24, 10), {})]
    fails(MatchError, adapters, Q, "12×10", "24×10", "small", "large")


def test_different_base_names_are_a_warning(tmp_path: Path) -> None:
    """Base names that differ are named in a warning; nothing is refused."""
    adapters = [
        lora(tmp_path / name, seed=n, base_model_name_or_path=f"org/{name}")
        for n, name in enumerate("ab")
    ]
    report = loratool.compare(adapters)
    assert [w.code for w in report.warnings] == ["bases-differ"]


def test_paths_that_differ_by_a_prefix_are_refused(tmp_path: Path) -> None:
    """`layers.0.q` and `model.layers.0.q` are one module under two names: nothing is guessed."""
    adapters = [lora(tmp_path / "a", "layers.0.q"), lora(tmp_path / "b", "model.layers.0.q")]
    fails(MatchError, adapters, "'layers.0.q'", "'model.layers.0.q'")


def test_what_is_no_lora_is_refused(tmp_path: Path, two: list[Path]) -> None:
    """A base model and weights without their config are called by their names."""
    fails(FileError, [two[0], FIXTURES / "base"], "base model")
    bare = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, [two[0], bare], "no adapter_config.json", str(bare))


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_files_are_named(two: list[Path], length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = two[1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, two, str(file))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_files_that_may_not_be_read_are_named(two: list[Path], name: str) -> None:
    """An input without read permission is a FileError that names it."""
    (two[1] / name).chmod(0)
    with permissions_that_count():
        fails(FileError, two, str(two[1] / name))


def test_inputs_are_not_touched(two: list[Path], tmp_path: Path) -> None:
    """A comparison writes nothing anywhere near its inputs."""
    before = sha256s(tmp_path)
    loratool.compare(two)
    assert sha256s(tmp_path) == before
