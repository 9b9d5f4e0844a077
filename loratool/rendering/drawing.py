"""A sheet on a terminal, or in a pipe as the text of one that is as wide as need be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loratool.rendering.sheet import (
    Facts,
    Line,
    Piece,
    Sentence,
    Sheet,
    SheetTable,
    Tone,
    Words,
    parts_of,
)
from loratool.rendering.terminal import fact_grid, out, verbatim

_STYLES: dict[Tone, str] = {
    "strong": "bold", "good": "green", "bad": "red", "warning": "yellow", "dim": "dim",
    "section": "cyan",
}  # fmt: skip

#: A terminal on which every table has the width it wants.
_ANY_WIDTH = 100_000


def draw(sheet: Sheet) -> None:
    """Print a sheet; charts and notices are for others. A line is left free between two blocks."""
    before: Piece | None = None
    for piece in sheet.pieces:
        is_block = isinstance(piece, Facts | SheetTable)
        after_block = isinstance(before, Facts | SheetTable)
        after_text = isinstance(before, Sentence | Line) and before is not sheet.pieces[0]
        apart = isinstance(piece, Sentence) and (piece.apart or after_block)
        if before is not None and (apart or (is_block and (after_block or after_text))):
            out.print()
        if isinstance(piece, Facts):
            _print(_grid(piece))
        elif isinstance(piece, SheetTable):
            _print(_table(piece))
        elif isinstance(piece, Sentence):
            # Wrapped on a terminal and whole in a pipe, unless somebody set its width.
            out.print(markup_of(piece.words), soft_wrap=not _has_width())
        elif isinstance(piece, Line):
            out.print(verbatim(piece.text), soft_wrap=True)
        else:
            continue
        before = piece


def markup_of(words: Words) -> str:
    """Words as a string with Rich's markup, their texts as they are."""
    shown = ""
    for part in parts_of(words):
        style = _STYLES.get(part.tone)
        text = verbatim(part.text)
        shown += f"[{style}]{text}[/]" if style else text
    return shown


def _has_width() -> bool:
    return out.is_terminal or "COLUMNS" in os.environ


def _width() -> int:
    return out.width if _has_width() else _ANY_WIDTH


def _print(table: Table) -> None:
    """Print a table as wide as there is room; in a pipe its lines end where their text does."""
    if out.is_terminal:
        out.print(table)
        return
    for line in out.render_lines(table, out.options.update(width=_width()), pad=False):
        text = "".join(segment.text for segment in line)
        out.print(Text(text.rstrip()), soft_wrap=True)


def _grid(facts: Facts) -> Table:
    grid = fact_grid()
    for what, words in facts.rows:
        grid.add_row(verbatim(what), markup_of(words))
    return grid


def _table(table: SheetTable) -> Table:
    """The table with the columns that there is room for."""
    for headings in table.headings:
        drawn = _drawn(table, headings)
        if _fits(drawn):
            return drawn
    left = list(headings)
    for heading in table.spare:
        if heading in left:
            left.remove(heading)
            drawn = _drawn(table, left)
            if _fits(drawn):
                break
    return drawn


def _fits(table: Table) -> bool:
    wanted = Measurement.get(out, out.options.update(width=_ANY_WIDTH), table).maximum
    return wanted <= _width()


def _drawn(table: SheetTable, headings: Sequence[str]) -> Table:
    drawn = Table(
        box=None, padding=(0, 1), pad_edge=False, header_style="bold",
        title=verbatim(table.caption) or None, title_justify="left", title_style="",
    )  # fmt: skip
    for heading in headings:
        numeric = table.is_numeric(heading)
        drawn.add_column(
            verbatim(heading), justify="right" if numeric else "left", no_wrap=numeric,
            overflow="fold",
        )  # fmt: skip
    for line in table.lines:
        if line.is_section:
            drawn.add_row(f"[cyan]{verbatim(str(line.cells['module']))}[/]")
        else:
            cells = [markup_of(line.cells.get(heading, "")) for heading in headings]
            drawn.add_row(*cells, style=_STYLES.get(line.tone, ""))
    return drawn
