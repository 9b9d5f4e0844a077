"""What resize cannot do is named, and nothing of value is replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import HEAD, PREFIX, WEIGHTS, K, Q, codes, deltas, lora, pair, write_adapter
from helpers.experts import DOWN, GATE_UP, expert_pairs, stacks
from helpers.outcomes import assert_clear, beside, sha256s
from helpers.permissions import permissions_that_count
from helpers.resizing import assert_near, fails, of_spectrum
from safetensors.numpy import load_file

import loratool
from loratool.errors import (
    AdapterError,
    FileError,
    LoraToolError,
    OutputError,
    UsageError,
    ValueRangeError,
)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_rank": 0}, ["--max-rank 0"]),
        ({"pad_to": 0}, ["--pad-to 0"]),
        ({"pad_to": -8}, ["--pad-to -8"]),
        ({"energy": 0.0}, ["--energy 0"]),
        ({"energy": -0.1}, ["--energy -0.1"]),
        ({"energy": 1.5}, ["--energy 1.5"]),
        ({"energy": math.nan}, ["--energy nan"]),
        ({"sv_fro": 99.0}, ["--sv-fro 99"]),
        ({"sv_cumulative": 0.0}, ["--sv-cumulative 0"]),
        ({"sv_ratio": 0.5}, ["--sv-ratio 0.5"]),
        ({"sv_ratio": math.inf}, ["--sv-ratio inf"]),
        ({"sv_ratio": math.nan}, ["--sv-ratio nan"]),
        ({"sv_ratio": 2, "energy": 0.5}, ["--energy and --sv-ratio"]),
        ({"sv_fro": 0.5, "sv_cumulative": 0.5}, ["--sv-fro and --sv-cumulative"]),
        ({"rank": 4, "max_rank": 8}, ["--rank and --max-rank"]),
        ({"rank": 4, "dtype": "int8"}, ["'int8'"]),
        ({"rank": 4, "threads": 0}, ["--threads must be at least 1"]),
        ({"rank": 4, "patterns": True}, ["--rank gives all modules one rank", "--patterns"]),
        ({"energy": 0.5, "pad_to": 4, "patterns": True}, ["--pad-to gives", "--patterns"]),
        ({"energy": 0.5, "uniform": True, "patterns": True}, ["--uniform and --patterns"]),
        ({"patterns": True}, ["No rank given"]),
        ({}, ["No rank given"]),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(
    one: Path, out: Path, options: dict[str, Any], parts: list[str]
) -> None:
    """Numbers that no option takes, and options that contradict each other, are quoted."""
    assert fails(UsageError, one, out, *parts, **{"rank": None, **options}).exit_code == 2


def test_an_empty_path_is_refused(out: Path) -> None:
    """An empty string (an unset shell variable) is a UsageError."""
    fails(UsageError, "", out, "empty")


@pytest.mark.parametrize("options", [{"rank": 10**13}, {"rank": None, "pad_to": 10**13}], ids=str)
def test_absurd_ranks_are_an_error_in_words(one: Path, out: Path, options: dict[str, Any]) -> None:
    """A rank that neither memory nor disk holds is an error in words, not a MemoryError."""
    fails(LoraToolError, one, out, **options)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "name",
    [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight", f"{PREFIX}{Q}.lora_B.bias",
     f"{PREFIX}{Q}.lora_magnitude_vector", HEAD],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [False, True])
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, out: Path, name: str, bad: float, dry_run: bool
) -> None:
    """NaN and infinity anywhere in the adapter stop the run with the tensor's name."""
    ones = np.ones(12, np.float32)
    extra = {HEAD: np.ones((3, 10), np.float32), f"{PREFIX}{Q}.lora_B.bias": ones,
             f"{PREFIX}{Q}.lora_magnitude_vector": ones.copy()}  # fmt: skip
    source = lora(tmp_path / "one", extra=extra, lora_bias=True, use_dora=True,
                  modules_to_save=["score"])  # fmt: skip
    tensors = load_file(source / WEIGHTS)
    tensors[name].reshape(-1)[1] = bad
    write_adapter(source, tensors, None)
    fails(ValueRangeError, source, out, name.removeprefix(PREFIX), "NaN", dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [False, True])
def test_overflow_of_the_dtype_is_refused(tmp_path: Path, out: Path, dry_run: bool) -> None:
    """Factors too large for float16 are refused with module and size, in a dry run too."""
    source = of_spectrum(tmp_path / "one", [1e12, 1.0])
    error = fails(
        ValueRangeError, source, out, "model.layers.0.q_proj", "too large",
        dtype="float16", dry_run=dry_run,
    )  # fmt: skip
    assert "float32" in error.hint


def test_an_adapter_that_does_nothing_is_refused(tmp_path: Path, out: Path) -> None:
    """An adapter with B = 0 everywhere has nothing to resize, and no other adapters are blamed."""
    source = lora(tmp_path / "zero")
    tensors = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
    write_adapter(source, tensors, None)
    error = fails(ValueRangeError, source, out, "does nothing")
    assert "weights" not in error.message
    assert "compare" not in error.hint  # of what?


def test_one_module_that_does_nothing_is_a_warning(one: Path, out: Path) -> None:
    """A module with B = 0 among others stays, at zero, with a warning."""
    tensors = load_file(one / WEIGHTS)
    tensors[f"{PREFIX}{K}.lora_B.weight"][:] = 0
    write_adapter(one, tensors, None)
    report = loratool.resize(one, out, rank=6)
    assert "zero-delta" in codes(report)
    assert {m.path: m.kept for m in report.modules} == {Q: 1.0, K: None}
    assert not deltas(out)[K].any()
    assert_near(one, out)


def test_weights_without_their_config_are_refused(tmp_path: Path, out: Path) -> None:
    """Without adapter_config.json the scale is unknown, so nothing is resized."""
    source = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, source, out, "no adapter_config.json", str(source))


def test_stacks_of_experts_are_refused(tmp_path: Path, out: Path) -> None:
    """Stacks of experts (target_parameters) are refused by name, all of them in one error."""
    source = stacks(tmp_path / "moe", expert_pairs(3, 12, 8, 4), expert_pairs(3, 8, 6, 4))
    fails(AdapterError, source, out, "target_parameters", str(source), GATE_UP, DOWN)


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_files_are_named(one: Path, out: Path, length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = one / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, one, out, str(file))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "tokenizer.json"])
def test_files_that_may_not_be_read_are_named(one: Path, out: Path, name: str) -> None:
    """An input without read permission is a FileError that names it, and there is no output."""
    (one / "tokenizer.json").write_text("{}")
    (one / name).chmod(0)
    with permissions_that_count():
        fails(FileError, one, out, str(one / name))


def test_an_existing_output_stays(one: Path, out: Path) -> None:
    """An output that exists is refused and stays; --overwrite-all replaces it with all in it."""
    loratool.resize(one, out, rank=2)
    (out / "README.md").write_text("old")
    before = sha256s(out)
    with pytest.raises(OutputError) as caught:
        loratool.resize(one, out, rank=3)
    assert "--overwrite" in caught.value.hint
    assert sha256s(out) == before
    loratool.resize(one, out, rank=3, overwrite="all")
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert beside(out) == []


@pytest.mark.parametrize("place", ["in/one", "in/one/out", "in"])
def test_the_input_is_never_written_to(tmp_path: Path, one: Path, place: str) -> None:
    """An output that is, contains or is in the input is refused even with --overwrite."""
    before = sha256s(tmp_path)
    with pytest.raises(OutputError) as caught:
        loratool.resize(one, tmp_path / place, rank=2, overwrite=True)
    assert_clear(caught.value, str(tmp_path / place))
    assert sha256s(tmp_path) == before
