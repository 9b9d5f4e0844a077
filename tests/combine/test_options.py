"""Options of combine that no run can take are refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.combining import fails

from loratool.errors import UsageError
from loratool.linalg.methods import METHODS


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"weights": [1.0, 2.0, 3.0]}, "3 weights were given for 2 adapters"),
        ({"weights": [1.0, math.nan]}, "nan"),
        ({"weights": [-math.inf, 1.0]}, "inf"),
        ({"weights": [0.0, 0.0]}, "All weights are 0"),
        ({"rank": -3}, "--rank -3"),
        ({"energy": 0.0}, "--energy 0"),
        ({"energy": 1.01}, "--energy 1.01"),
        ({"energy": math.nan}, "--energy nan"),
        ({"method": "Sum"}, "Unknown method 'Sum'"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"saved": "both"}, "'both'"),
    ],
)
def test_options_out_of_range_are_refused(
    two: list[Path], out: Path, options: dict[str, Any], part: str
) -> None:
    """Numbers and names that no option takes are UsageErrors that quote them."""
    assert fails(UsageError, two, out, part, **options).exit_code == 2


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.prunes])
@pytest.mark.parametrize("density", [None, 0.0, -0.1, 1.5, math.nan])
def test_pruning_needs_a_density_that_is_a_share(
    two: list[Path], out: Path, method: str, density: float | None
) -> None:
    """Pruning methods refuse a density that is missing or not above 0 and at most 1."""
    part = "needs a density" if density is None else f"{density:g}"
    fails(UsageError, two, out, part, method=method, density=density)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.prunes])
def test_a_density_for_nothing_is_refused(two: list[Path], out: Path, method: str) -> None:
    """Methods that do not prune refuse a density instead of ignoring it."""
    fails(UsageError, two, out, method, "does not prune", method=method, density=0.5)


def test_no_adapter_and_an_empty_path_are_refused(two: list[Path], out: Path) -> None:
    """An empty list and an empty string (an unset shell variable) are UsageErrors."""
    fails(UsageError, [], out, "No adapter")
    fails(UsageError, [two[0], ""], out, "empty")


def test_a_negative_seed_is_refused(two: list[Path], out: Path) -> None:
    """The library refuses a seed below zero in words, as the command line does."""
    fails(UsageError, two, out, "-1", method="dare_linear", density=0.5, seed=-1)
