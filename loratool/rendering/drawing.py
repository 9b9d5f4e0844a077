"""A sheet on a terminal, or in a pipe as the text of one that is as wide as need be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from loratool.rendering.terminal import fact_grid, out
from loratool.sheet import (
    CodeBlock,
    Facts,
    Heading,
    Line,
    Piece,
    Points,
    Sentence,
    Sheet,
    SheetTable,
    Tone,
    Words,
    parts_of,
    strong,
)
from loratool.text import fitting, printable, printable_code

_STYLES: dict[Tone, str] = {
    "strong": "bold", "good": "green", "bad": "red", "warning": "yellow", "dim": "dim",
    "section": "cyan",
}  # fmt: skip

#: Pieces that are said, not laid out.
_TEXTS = (Sentence, Points, CodeBlock, Line)

#: A terminal on which every table has the width it wants.
_ANY_WIDTH = 100_000


def draw(sheet: Sheet) -> None:
    """Print a sheet; charts and notices are for others. A line is left free between two blocks."""
    before: Piece | None = None
    for piece in sheet.pieces:
        is_block = isinstance(piece, Facts | SheetTable)
        after_block = isinstance(before, Facts | SheetTable)
        after_text = isinstance(before, _TEXTS) and before is not sheet.pieces[0]
        apart = isinstance(piece, Heading) or (isinstance(piece, Sentence) and piece.apart)
        apart = apart or (after_block and isinstance(piece, Sentence | Points | CodeBlock))
        if before is not None and (apart or (is_block and (after_block or after_text))):
            out.print()
        if isinstance(piece, Facts):
            _print(_grid(piece))
        elif isinstance(piece, SheetTable):
            _print(_table(piece))
        elif isinstance(piece, Heading):
            _say(styled(strong(piece.text)))
        elif isinstance(piece, Sentence):
            _say(styled(piece.words))
        elif isinstance(piece, Points):
            for item in piece.items:
                _say(Text.assemble("  - ", styled(item)))
        elif isinstance(piece, CodeBlock | Line):
            for line in piece.lines if isinstance(piece, CodeBlock) else [piece.text]:
                out.print(Text(fitting(printable_code(line), out.encoding)), soft_wrap=True)
        else:
            continue
        before = piece


def _say(text: Text) -> None:
    """Wrapped on a terminal and whole in a pipe, unless somebody set its width."""
    out.print(text, soft_wrap=not _has_width())


def styled(words: Words) -> Text:
    """Words with their styles, their texts as they are but for what no terminal should get."""
    text = Text()
    for part in parts_of(words):
        text.append(_shown(part.text), _STYLES.get(part.tone))
        if part.link and part.link != part.text:
            text.append(f" ({_shown(part.link)})")
    return text


def _shown(text: str) -> str:
    """A text from anywhere, as this stream can show it."""
    return fitting(printable(text), out.encoding)


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
        grid.add_row(Text(_shown(what)), styled(words))
    return grid


def _table(table: SheetTable) -> Table:
    """The table with the columns that there is room for."""
    lines = [
        {heading: styled(cell) for heading, cell in line.cells.items()} for line in table.lines
    ]
    for headings in table.headings:
        left = list(headings)
        if _width_of(left, lines) <= _width():
            return _drawn(table, left, lines)
    for heading in table.spare:
        if heading in left:
            left.remove(heading)
            if _width_of(left, lines) <= _width():
                break
    return _drawn(table, left, lines)


def _width_of(headings: Sequence[str], lines: Sequence[dict[str, Text]]) -> int:
    """Cells of a line with these columns, two between two of them."""
    widths = [
        max(
            [
                cell_len(_shown(heading)),
                *(line[heading].cell_len for line in lines if heading in line),
            ]
        )
        for heading in headings
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def _drawn(table: SheetTable, headings: Sequence[str], lines: Sequence[dict[str, Text]]) -> Table:
    drawn = Table(
        box=None, padding=(0, 1), pad_edge=False, header_style="bold",
        title=Text(_shown(table.caption)) if table.caption else None, title_justify="left",
        title_style="",
    )  # fmt: skip
    for heading in headings:
        numeric = table.is_numeric(heading)
        drawn.add_column(
            Text(_shown(heading)), justify="right" if numeric else "left", no_wrap=numeric,
            overflow="fold",
        )  # fmt: skip
    for line, texts in zip(table.lines, lines, strict=True):
        style = _STYLES["section"] if line.is_section else _STYLES.get(line.tone, "")
        drawn.add_row(*[texts.get(heading, "") for heading in headings], style=style)
    return drawn
