"""Sheets as one page of HTML that needs nothing else: no network, no script, no second file.

It reads on a phone, on paper, in light and in dark; every text that comes from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loratool.notices import Notice
from loratool.rendering.plots import has_plots, said_of, svg_of
from loratool.sheet import (
    Bars,
    Chart,
    CodeBlock,
    Curves,
    Facts,
    Heading,
    HeatMap,
    Line,
    Piece,
    Points,
    Sentence,
    Sheet,
    SheetLine,
    SheetTable,
    Words,
    parts_of,
)
from loratool.text import printable, printable_code
from loratool.version import __version__

#: Colours of both schemes have a contrast of 4.5 at least, to their ground and to that of a table.
_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1b1b; --soft: #57606a;
  --line: #d0d7de; --panel: #f6f8fa; --good: #116329; --bad: #a40e26; --warning: #7d4e00;
  --section: #0550ae }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9da7b3;
  --line: #30363d; --panel: #161b22; --good: #56d364; --bad: #ff8078; --warning: #e3b341;
  --section: #79c0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 75rem; background: var(--ground);
  color: var(--ink); font: 0.95rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem;
  overflow-wrap: anywhere } h3 { font-size: 1rem } h3, li { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.15rem 1rem }
dt { font-weight: 600 } dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px }
.wide:focus-visible { outline: 2px solid var(--section) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: 0.4rem 0.7rem; font-weight: 600 }
th, td { padding: 0.2rem 0.7rem; text-align: left; white-space: pre-wrap; vertical-align: top }
thead th { background: var(--panel); border-bottom: 1px solid var(--line); white-space: nowrap }
tbody tr + tr { border-top: 1px solid var(--line) }
th[scope=row] { font-weight: normal; overflow-wrap: anywhere; min-width: 9rem }
.short { white-space: nowrap }
th.inner { padding-left: 1.7rem }
.number { text-align: right; white-space: nowrap }
.section th { color: var(--section); background: var(--panel) }
p { margin: 0.4rem 0; overflow-wrap: anywhere; white-space: pre-wrap }
.apart { margin-top: 1.2rem }
.strong { font-weight: 600 } .good { color: var(--good); font-weight: 600 }
.bad { color: var(--bad); font-weight: 600 } .warning { color: var(--warning) }
.dim { color: var(--soft) } .in-section { color: var(--section) }
.notices { list-style: none; padding: 0 } .notices li { margin: 0.5rem 0; padding: 0.4rem 0.8rem;
  border-left: 4px solid var(--warning); background: var(--panel); white-space: pre-wrap;
  overflow-wrap: anywhere } .notices .refused { border-color: var(--bad) }
pre { overflow-x: auto; padding: 0.5rem 0.8rem; background: var(--panel); border-radius: 6px }
a { color: var(--section) }
code { font-family: ui-monospace, monospace; font-size: 0.9em }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem),
  1fr)) }
figure { margin: 0; padding: 0.5rem; border: 1px solid var(--line); border-radius: 6px }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
figcaption { color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere }
footer { margin-top: 2rem; color: var(--soft); font-size: 0.85rem }
@media print { body { max-width: none; padding: 0 } .wide { overflow: visible; border: 0 }
  figure, tr, .notices li { break-inside: avoid } }
"""

#: Cells up to so many characters are not broken into lines.
_ONE_LINE = 24
_SHORT = ' class="short"'

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_of(sheets: Sequence[Sheet]) -> str:
    """A whole document. With several sheets each has a heading of its own."""
    body = "".join(section_of(sheet, len(sheets) > 1) for sheet in sheets)
    titles = ", ".join(dict.fromkeys(sheet.title for sheet in sheets))
    alone = sheets[0].subject if len(sheets) == 1 else ""
    name = _text(f"loratool {titles}" + (f": {alone}" if alone else ""))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{name}</h1></header>\n<main>\n{body}</main>\n"
        f"<footer>Made by loratool {__version__}.</footer>\n</body>\n</html>\n"
    )


def section_of(sheet: Sheet, named: bool) -> str:
    """One sheet: its first facts, what was odd, its charts, and the rest; with a heading if it is
    `named`."""
    parts = [f"<h2>{_text(sheet.subject or sheet.title)}</h2>\n"] if named else []
    texts = [piece for piece in sheet.pieces if not isinstance(piece, HeatMap | Curves | Bars)]
    first = next((i + 1 for i, p in enumerate(texts) if isinstance(p, Facts)), len(texts))
    parts += [_piece(piece, 2 + named) for piece in texts[:first]]
    if sheet.notices:
        parts.append(_notices(sheet.notices))
    if sheet.charts:
        parts.append(_charts(sheet.charts))
    parts += [_piece(piece, 2 + named) for piece in texts[first:]]
    return f"<section>\n{''.join(parts)}</section>\n"


def _charts(charts: Sequence[Chart]) -> str:
    if has_plots():
        return f'<div class="charts">\n{"".join(map(_figure, charts))}</div>\n'
    return (
        '<p class="dim apart">Without charts: matplotlib is not installed '
        "(pip install 'loratool[plot]').</p>\n"
    )


def _text(text: str) -> str:
    """A text from anywhere, on one line, fit to stand between tags and in an attribute."""
    return escape(printable(text))


def _words(words: Words) -> str:
    shown = ""
    for part in parts_of(words):
        text = _text(part.text)
        kind = "in-section" if part.tone == "section" else part.tone
        if part.tone == "code":
            text = f"<code>{text}</code>"
        elif part.tone != "plain":
            text = f'<span class="{kind}">{text}</span>'
        shown += f'<a href="{_text(part.link)}">{text}</a>' if part.link else text
    return shown


def _piece(piece: Piece, level: int) -> str:
    """Everything but a chart; headings are of this level."""
    if isinstance(piece, Facts):
        rows = "".join(f"<dt>{_text(what)}</dt><dd>{_words(w)}</dd>\n" for what, w in piece.rows)
        return f"<dl>\n{rows}</dl>\n"
    if isinstance(piece, SheetTable):
        return _table(piece)
    if isinstance(piece, Sentence):
        kind = ' class="apart"' if piece.apart else ""
        return f"<p{kind}>{_words(piece.words)}</p>\n"
    if isinstance(piece, Heading):
        return f"<h{level}>{_text(piece.text)}</h{level}>\n"
    if isinstance(piece, Points):
        return f"<ul>\n{''.join(f'<li>{_words(item)}</li>' for item in piece.items)}</ul>\n"
    if isinstance(piece, CodeBlock):
        lines = "\n".join(escape(printable_code(line)) for line in piece.lines)
        return f'<pre tabindex="0"><code>{lines}</code></pre>\n'
    assert isinstance(piece, Line)
    return f"<p><code>{escape(printable_code(piece.text))}</code></p>\n"


def _table(table: SheetTable) -> str:
    headings = table.headings[0]
    kinds = [' class="number"' if table.is_numeric(heading) else "" for heading in headings]
    head = "".join(
        f'<th scope="col"{kind}>{_text(heading)}</th>'
        for heading, kind in zip(headings, kinds, strict=True)
    )
    rows = "".join(_row(line, headings, kinds) for line in table.lines)
    caption = f"<caption>{_text(table.caption)}</caption>\n" if table.caption else ""
    label = _text(table.caption or f"Table by {headings[0]}")
    return (
        f'<div class="wide" role="group" tabindex="0" aria-label="{label}">\n<table>\n{caption}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _row(line: SheetLine, headings: Sequence[str], kinds: Sequence[str]) -> str:
    if line.is_section:
        name = _words(next(iter(line.cells.values())))
        across = len(headings)
        return f'<tr class="section"><th scope="rowgroup" colspan="{across}">{name}</th></tr>\n'
    first, *others = (_words(line.cells.get(heading, "")) for heading in headings)
    kind = ' class="inner"' if first.startswith("  ") else kinds[0]
    cells = "".join(
        f"<td{kind or _SHORT * (len(cell) <= _ONE_LINE)}>{cell}</td>"
        for cell, kind in zip(others, kinds[1:], strict=True)
    )
    tone = "" if line.tone == "plain" else f' class="{line.tone}"'
    return f'<tr{tone}><th scope="row"{kind}>{first.strip()}</th>{cells}</tr>\n'


def _notices(notices: Sequence[Notice]) -> str:
    """What was odd; the messages are printable already, and may have lines."""
    items = ""
    for notice in notices:
        kind = ("refused", "cannot merge") if notice.refused else ("odd", "warning")
        tone = "bad" if notice.refused else "warning"
        label = f'<span class="{tone}">{kind[1]}</span>'
        message = escape(notice.message)
        items += f'<li class="{kind[0]}">{label} <code>{_text(notice.code)}</code> {message}</li>\n'
    return f'<ul class="notices">\n{items}</ul>\n'


def _figure(chart: Chart) -> str:
    said = _text(f"{chart.title}. {said_of(chart)}")
    return (
        f'<figure>\n<div role="img" aria-label="{said}">{svg_of(chart)}</div>\n'
        f"<figcaption>{_text(said_of(chart))}</figcaption>\n</figure>\n"
    )
