"""A sheet on a terminal: columns go where there is no room, nothing is cut in a pipe."""

from __future__ import annotations

import pytest
from helpers.cli import run_cli
from helpers.places import FIXTURES

from loratool.rendering.drawing import draw
from loratool.rendering.terminal import out
from loratool.sheet import CodeBlock, Facts, Heading, Points, Sheet, code, listed_words, said

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


def test_code_lists_links_and_headings_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A heading stands apart, the address of a link behind it, and no line of code is wrapped."""
    monkeypatch.setattr(out, "_width", 40)
    monkeypatch.setenv("COLUMNS", "40")  # somebody set it, so that lines are wrapped
    line = "loratool merge " + "x" * 60
    link = code("org/base", "https://hub.example/org/base")
    draw(Sheet("card", [
        said("Of ", link, " and ", code("a.json"), "."),
        Heading("Use"),
        CodeBlock("sh", [line, "two\x1b[31m"]),
        Points(["one", code("two")]),
        Facts([("rank", "8")]),
        Points(["three"]),
    ]))  # fmt: skip
    assert capsys.readouterr().out == (
        "Of org/base \n(https://hub.example/org/base) and \na.json.\n"
        f"\nUse\n{line}\ntwo\\x1b[31m\n  - one\n  - two\n\nrank  8\n\n  - three\n"
    )


def test_words_that_have_tones_are_listed_like_texts() -> None:
    """One, two, three, and more than are shown."""

    def text(count: int) -> str:
        listed = listed_words([(code(str(n)), "x") for n in range(count)], shown=3)
        return "".join(part if isinstance(part, str) else f"<{part.text}>" for part in listed)

    assert [text(n) for n in range(6)] == [
        "", "<0>x", "<0>x and <1>x", "<0>x, <1>x and <2>x", "<0>x, <1>x, <2>x and 1 more",
        "<0>x, <1>x, <2>x and 2 more",
    ]  # fmt: skip
