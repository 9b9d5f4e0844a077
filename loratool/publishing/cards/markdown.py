"""A sheet as Markdown, the form that the Hub shows: of a model card, and of any answer.

Charts are for others, as on a terminal. Nothing else of a card knows how Markdown is written, and
every text that comes from a file is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loratool.notices import Notice
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
    Toned,
    Words,
    code,
    joined_words,
    parts_of,
    plain_text,
    strong,
)
from loratool.text import printable, printable_code

#: Signs that Markdown reads, wherever they stand; an underscore only at the edge of a word, no "<"
#: before a number, as shares have it, and of addresses, which become links, one sign each.
_READ = re.compile(
    r"[\\`*\[\]>#|&~!$@]|<(?!\d)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE
)
#: What makes a list or a line of a paragraph that begins with it; a sign goes behind the match.
_BEGINS = re.compile(r"^(?:(?=[-+=])|\d{1,9}(?=[.)](?:\s|$)))")


def markdown_of(sheet: Sheet) -> str:
    """The pieces of a sheet, a free line between two of them; its title is for the document."""
    drawn = [*map(_piece, sheet.pieces), _points([_odd(notice) for notice in sheet.notices])]
    return "\n\n".join(filter(None, drawn))


def markdown_title(text: str) -> str:
    return f"# {_inline(text)}"


def _piece(piece: Piece) -> str:
    if isinstance(piece, Heading):
        return f"## {_inline(piece.text)}"
    if isinstance(piece, Sentence):
        return _paragraph(piece.words)
    if isinstance(piece, Points):
        return _points(piece.items)
    if isinstance(piece, CodeBlock):
        return _block(piece)
    if isinstance(piece, Line):
        return _code_span(printable_code(piece.text))
    if isinstance(piece, SheetTable):
        return _table(piece)
    return _facts(piece) if isinstance(piece, Facts) else ""


def _paragraph(words: Words) -> str:
    """Words that are no list and no line below a heading, whatever they begin with."""
    return _BEGINS.sub(r"\g<0>\\", _inline(words))


def _inline(words: Words) -> str:
    return "".join(map(_part, parts_of(words))).strip()


def _part(part: Toned) -> str:
    text = _code_span(_line(part.text).strip()) if part.tone == "code" else _prose(part)
    # What looks like an entity is read as one in addresses too.
    return f"[{text}]({part.link.replace('&', '&amp;')})" if part.link else text


def _line(text: str) -> str:
    """Printable, and with single spaces."""
    return re.sub(" +", " ", printable(text))


def _prose(part: Toned) -> str:
    """A part among words: the signs in it that Markdown would read are escaped."""
    text = _READ.sub(r"\\\g<0>", _line(part.text))
    inner = text.strip()
    if part.tone != "strong" or not inner:
        return text
    start = len(text) - len(text.lstrip())
    return f"{text[:start]}**{inner}**{text[start + len(inner) :]}"


def _code_span(text: str) -> str:
    """A text that Markdown shows unchanged, between more backticks than it has in a row."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text or ' '}{space}{fence}"


def _block(block: CodeBlock) -> str:
    """Lines between fences that none of them can end."""
    lines = [printable_code(line) for line in block.lines]
    runs = [len(found[1]) + 1 for line in lines if (found := re.match(" {0,3}(`+)", line))]
    fence = "`" * max(3, *runs, 0)
    return "\n".join([f"{fence}{block.language}", *lines, fence])


def _points(items: Iterable[Words]) -> str:
    return "\n".join(f"- {_paragraph(item)}" for item in items)


def _facts(facts: Facts) -> str:
    """A point for each; what goes on with it stands on a line below."""
    said = ""
    for what, words in facts.rows:
        if what:
            said += f"\n- {_inline(joined_words(strong(what), ': ', words))}"
        else:
            said += f"\\\n  {_paragraph(words)}"
    return said.strip()


def _table(table: SheetTable) -> str:
    """The widest columns: a page of Markdown scrolls."""
    headings = table.headings[0]
    lines = [_row(headings), _row(["---"] * len(headings))]
    for line in table.lines:
        if line.is_section:
            name = strong(plain_text(next(iter(line.cells.values()))))
            lines.append(_row([name, *[""] * (len(headings) - 1)]))
        else:
            lines.append(_row([line.cells.get(heading, "") for heading in headings]))
    caption = f"{_inline(strong(table.caption))}\n\n" if table.caption else ""
    return caption + "\n".join(lines)


def _row(cells: Sequence[Words]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(words: Words) -> str:
    """What no `|` may end: those of words are escaped already, those of code are not."""
    return "".join(map(_part_of_cell, parts_of(words))).strip()


def _part_of_cell(part: Toned) -> str:
    if part.tone != "code":
        return _part(part)
    if r"\|" in part.text:  # which programs read differently in code, some as the cell's end
        return _part(replace(part, tone="plain"))
    return _part(part).replace("|", r"\|")


def _odd(notice: Notice) -> Words:
    label = "cannot merge" if notice.refused else "warning"
    message = " ".join(notice.message.split())  # which may have the lines of a list
    return strong(label), " ", code(notice.code), f": {message}"
