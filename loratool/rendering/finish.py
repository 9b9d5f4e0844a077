"""What `finish` found complete; what it completed is said as the command says it that made it."""

from __future__ import annotations

from loratool.sheet import Facts, Sheet
from loratool.verbs.finish import FinishReport


def finish_sheet(report: FinishReport) -> Sheet:
    return Sheet("finish", [Facts([("output", f"{report.output}, complete before this")])])
