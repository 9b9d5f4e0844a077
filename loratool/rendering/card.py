"""Show what `card` wrote or would write."""

from __future__ import annotations

from loratool.rendering.terminal import out, print_file, verbatim
from loratool.verbs.card import CardReport

_FATES = {"made": "written", "completed": "completed", "kept": "complete as it was"}


def show_card(report: CardReport) -> None:
    if report.dry_run:
        print_file(report.text)
    else:
        out.print(f"{verbatim(report.path)}: {_FATES[report.card]}")
