"""What `finish` completed, as the command says it that made it."""

from __future__ import annotations

from typing import Any

from loratool.rendering.sheet import Sheet
from loratool.rendering.sheets import sheet_for


def finish_sheet(report: Any) -> Sheet:
    return sheet_for(report)
