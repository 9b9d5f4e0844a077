"""Options of extract that make no sense, or leave nothing to hold, are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.extracting import UP1, Pair, model, moved
from helpers.files import NORM

from loratool.errors import UsageError, ValueRangeError


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_to_hold_is_refused(tmp_path: Path, dry_run: bool) -> None:
    """No change in what was chosen, and changes of norms alone, are errors that name what did
    change."""
    some = Pair(tmp_path, model(), moved(model(), f"{UP1}.weight"))
    error = some.fails(
        ValueRangeError, "Nothing differs in what was selected", f"{UP1}.weight",
        include=["q_proj"], dry_run=dry_run,
    )  # fmt: skip
    assert "--include" in error.hint
    norms = Pair(tmp_path / "norms", model(), moved(model(), "norm.weight"))
    norms.fails(ValueRangeError, "No weight that could become factors", NORM, dry_run=dry_run)


def test_errors_count_in_words_that_agree(tmp_path: Path) -> None:
    """A model of one tensor is "1 tensor", and one of several that differ is one that differs."""
    one = {f"{UP1}.weight": model()[f"{UP1}.weight"]}
    copy = {n: t.double() for n, t in one.items()}
    Pair(tmp_path / "copy", one, copy).fails(ValueRangeError, "none of 1 tensor differs.")
    half = {n: t.half() for n, t in one.items()}
    Pair(tmp_path / "half", one, half).fails(ValueRangeError, "1 of 1 tensor differs, by")
    two = {**one, "b.weight": one[f"{UP1}.weight"].clone()}
    Pair(tmp_path / "two", two, two | half).fails(ValueRangeError, "1 of 2 tensors differs, by")
    Pair(tmp_path / "none", two, {n: t.double() for n, t in two.items()}).fails(
        ValueRangeError, "none of 2 tensors differ."
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rank": None}, ["No rank given"]),
        ({"energy": 0.5}, ["--rank and --energy"]),
        ({"budget": "1MB"}, ["--rank and --budget"]),
        ({"rank": None, "energy": 0.5, "budget": "1MB"}, ["--energy and --budget"]),
        ({"max_rank": 4}, ["--rank and --max-rank"]),
        ({"rank": None, "max_rank": 4}, ["No rank given"]),
        ({"rank": None, "max_rank": 4, "dry_run": True}, ["--max-rank"]),
        ({"patterns": True}, ["--rank gives all modules one rank", "--patterns"]),
        (
            {"rank": None, "energy": 0.5, "uniform": True, "patterns": True},
            ["--uniform and --patterns"],
        ),
        ({"rank": 0}, ["--rank 0"]),
        ({"rank": -3}, ["--rank -3"]),
        ({"rank": None, "energy": 0.0}, ["--energy 0"]),
        ({"rank": None, "energy": 1.01}, ["--energy 1.01"]),
        ({"rank": None, "energy": math.nan}, ["--energy nan"]),
        ({"rank": None, "energy": 0.9, "max_rank": 0}, ["--max-rank 0"]),
        ({"rank": None, "budget": 0}, ["--budget"]),
        ({"rank": None, "budget": "-5MB"}, ["'-5MB'", "size"]),
        ({"rank": None, "budget": "50 parsecs"}, ["'50 parsecs'"]),
        ({"rank": None, "budget": ""}, ["''"]),
        ({"rank": None, "budget": "MB"}, ["'MB'"]),
        ({"dtype": "int8"}, ["'int8'"]),
        ({"dtype": "base"}, ["'base'"]),
        ({"skip": ["norm"]}, ["'norm'"]),
        ({"skip": ["linears"]}, ["'linears'"]),
        ({"threads": 0}, ["--threads must be at least 1", "got 0"]),
        ({"device": "gpu"}, ["'gpu'"]),
        ({"device": "mps"}, ["mps"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"include": ["nosuch"]}, ["--include 'nosuch'", "no module"]),
        ({"exclude": ["q_proj", "*.nosuch"]}, ["--exclude '*.nosuch'"]),
        ({"save": ["layers.7.*"]}, ["--save 'layers.7.*'"]),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(
    tiny: Pair, options: dict[str, Any], parts: list[str]
) -> None:
    """Values that no option takes, contradictions and globs without a match are quoted."""
    assert tiny.fails(UsageError, *parts, **options).exit_code == 2


def test_a_near_miss_is_suggested(tiny: Pair) -> None:
    """Misspelled dtypes and groups get the nearest right one."""
    assert "float32" in tiny.fails(UsageError, dtype="flaot32").hint
    assert "norms" in tiny.fails(UsageError, skip=["nroms"]).hint
