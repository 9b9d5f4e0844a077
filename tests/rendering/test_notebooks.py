"""Reports as values: in a notebook, at a prompt, as a data frame."""

from __future__ import annotations

import sys
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest
from helpers.files import small_lora
from helpers.pages import Page
from helpers.places import FIXTURES

import loratool
from loratool.errors import UsageError


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    """So its style is its own, and no script runs."""
    report = loratool.inspect(FIXTURES / "adapter")
    frame = Page(report._repr_html_())
    (attributes,) = frame.named("iframe")
    assert attributes["sandbox"] == ""
    page = Page(unescape(attributes["srcdoc"]))
    assert "mlp.up_proj" in page.text
    assert page.named("figure")


def test_a_prompt_shows_a_few_lines(tmp_path: Path) -> None:
    """Not hundreds of numbers, and nothing raw."""
    report = loratool.inspect(small_lora(tmp_path / "a\x1b[31m"))
    lines = repr(report).splitlines()
    assert lines[0] == "InspectReport"
    assert 4 < len(lines) < 16
    assert "\x1b" not in repr(report)


def test_every_report_shows_itself(tmp_path: Path) -> None:
    """Whatever verb made it."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    reports = [
        loratool.merge(base, adapter, tmp_path / "merged", reversible=True),
        loratool.verify(tmp_path / "merged", base, adapter),
        loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back"),
        loratool.resize(adapter, tmp_path / "small", rank=2),
        loratool.combine([adapter, tmp_path / "small"], tmp_path / "both"),
        loratool.compare([adapter, tmp_path / "small"]),
        loratool.convert(adapter, tmp_path / "mlx", to="mlx"),
        loratool.extract(base, tmp_path / "merged", tmp_path / "x", rank=2, dry_run=True),
        loratool.card(adapter, dry_run=True),
    ]
    for report in reports:
        assert repr(report).splitlines()[0] == type(report).__name__
        assert report._repr_html_().startswith("<iframe")


def test_rows_become_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pandas makes of the same rows that JSON has; without pandas it is said."""
    report = loratool.inspect(FIXTURES / "adapter")
    frames = ModuleType("pandas")
    frames.DataFrame = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", frames)
    assert report.to_frame() == report.to_dict()["modules"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="not installed"):
        report.to_frame()
