"""Words and tables of a card, as Markdown shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loratool.text import printable

HUB = "https://huggingface.co"


#: Signs that Markdown reads, wherever they stand; an underscore only at the edge of a word.
_READ = re.compile(r"[\\`*\[\]<>#|&~!$]|(?<![^\W_])_|_(?![^\W_])")


def one_line(text: str) -> str:
    """`text` printable, and such that UTF-8 can hold it, with single spaces."""
    return " ".join(printable(text).split())


def prose(text: str) -> str:
    """`text` among words: the signs in it that Markdown would read are escaped."""
    return _READ.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """`text` as Markdown shows it unchanged, in tables too."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text or ' '}{space}{fence}"


def cell(text: str) -> str:
    """What stands in a table's cell: no `|` may end it."""
    return text.replace("|", r"\|")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def link(repo: str) -> str:
    return f"[{code(repo)}]({HUB}/{repo})"


def span(values: Iterable[float | None]) -> str:
    """ "8" for one value, "5–7" for several."""
    known = sorted({value for value in values if value is not None})
    shown = list(dict.fromkeys(f"{value:.4g}" for value in known))
    return "–".join(shown if len(shown) < 2 else [shown[0], shown[-1]]) or "unknown"
