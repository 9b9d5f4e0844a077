"""Reports in notebooks: the page in a frame of its own; and in a few lines anywhere else."""

from __future__ import annotations

from html import escape
from typing import Any

from loratool.rendering.page import page_of
from loratool.rendering.sheets import facts_of, sheet_for
from loratool.text import printable


def html_of(report: Any) -> str:
    """The page of a report in a frame, so that its style is not that of the notebook."""
    page = escape(page_of([sheet_for(report)]))
    return (
        f'<iframe sandbox title="{escape(printable(type(report).__name__))}" srcdoc="{page}" '
        'style="width: 100%; height: 40rem; border: 0; resize: vertical"></iframe>'
    )


def text_of(report: Any) -> str:
    """The report's name, its first facts, and how many warnings it has."""
    lines = [
        f"  {what:14} {printable(text)}".rstrip() for what, text in facts_of(sheet_for(report))
    ]
    warnings = len(getattr(report, "warnings", ()))
    if warnings:
        lines.append(f"  {'warnings':14} {warnings}")
    return "\n".join([type(report).__name__, *lines])
