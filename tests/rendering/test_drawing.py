"""A sheet on a terminal: columns go where there is no room, nothing is cut in a pipe."""

from __future__ import annotations

import pytest
from helpers.cli import run_cli
from helpers.places import FIXTURES

ADAPTER = FIXTURES / "adapter"


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 160])
def test_a_table_fits_its_terminal(width: int) -> None:
    """Columns are left out, the least important first, and no line is longer than the terminal."""
    ran = run_cli("inspect", ADAPTER, COLUMNS=str(width))
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= width
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    assert "‖ΔW‖" in lines[start]
    assert all("_proj" in line for line in lines[start + 2 :])


def test_wider_terminals_show_more() -> None:
    """Each width has the columns of a narrower one, in other words perhaps, and more."""
    counts = [
        len(run_cli("inspect", ADAPTER, COLUMNS=str(width)).stdout.splitlines()[-1].split())
        for width in (40, 60, 80, 160)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_nothing_is_cut_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets all columns, as long as nobody sets a width."""
    monkeypatch.delenv("COLUMNS", raising=False)
    ran = run_cli("inspect", ADAPTER)
    assert "stable rank" in ran.stdout
    assert not [line for line in ran.stdout.splitlines() if line != line.rstrip()]
