"""Show what `card` wrote or would write."""

from __future__ import annotations

from rich.markup import escape

from loratool.rendering.terminal import out
from loratool.verbs.card import CardReport

_FATES = {"made": "written", "completed": "completed", "kept": "complete as it was"}


def show_card(report: CardReport) -> None:
    if report.dry_run:
        out.print(escape(report.text), soft_wrap=True, highlight=False, end="")
    else:
        out.print(f"{escape(report.path)}: {_FATES[report.card]}")
