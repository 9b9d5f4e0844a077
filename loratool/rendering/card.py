"""What `card` wrote or would write: the card itself, or a line about it."""

from __future__ import annotations

from loratool.rendering.drawing import draw
from loratool.rendering.terminal import print_file
from loratool.sheet import Line, Sheet
from loratool.verbs.card import CardReport

_FATES = {"made": "written", "completed": "completed", "kept": "complete as it was"}


def card_sheet(report: CardReport) -> Sheet:
    return Sheet("card", [Line(f"{report.path}: {_FATES[report.card]}")], report.warnings)


def show_card(report: CardReport) -> None:
    """The card as it is in a dry run, else what became of it."""
    if report.dry_run:
        print_file(report.text)
    else:
        draw(card_sheet(report))
