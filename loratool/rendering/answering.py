"""An answer in the forms that were asked for: text or JSON, a page, a picture, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.rendering.drawing import draw
from loratool.rendering.page import page_of
from loratool.rendering.plots import PICTURES, check_plots, has_plots, write_plot
from loratool.rendering.terminal import out, print_json, print_warnings, say_aside
from loratool.sheet import Sheet
from loratool.storage.onefile import check_place, write_file

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Forms:
    """How an answer is wanted: as text, unless as JSON; `html` and `plot` are files beside it."""

    as_json: bool = False
    quiet: bool = False
    html: str | None = None
    plot: str | None = None

    def check(self) -> None:
        """Raise for files that cannot be written, before the work begins."""
        if self.html is not None:
            check_place(Path(self.html), "--html", PAGES)
        if self.plot is not None:
            check_place(Path(self.plot), "--plot", PICTURES)
            check_plots()

    @property
    def draws(self) -> bool:
        """Whether charts are wanted, and what only they need."""
        return self.html is not None or self.plot is not None

    @property
    def talk(self) -> bool:
        """Whether people wait for it, who want to see how far it is."""
        return not (self.quiet or self.as_json)

    def show(self, report: Any, sheet: Sheet, document: dict[str, Any] | None = None) -> None:
        """One answer, and what was odd. `document` stands for the report's own where it is not
        all of that."""
        if self.as_json:
            print_json(report.to_dict() if document is None else document)
        else:
            draw(sheet)
            if not self.quiet:
                print_warnings(sheet.notices)
        self.write([sheet])

    def write(self, sheets: Sequence[Sheet]) -> None:
        """The page and the picture of one answer or several."""
        if self.html is not None:
            write_file(Path(self.html), page_of(sheets).encode())
            if not has_plots() and not self.quiet:
                say_aside("The page has no charts: pip install 'loratool[plot]' for them.")
        if self.plot is not None:
            write_plot([chart for sheet in sheets for chart in sheet.charts], Path(self.plot))


def free_line() -> None:
    """A line between two answers."""
    out.print()
