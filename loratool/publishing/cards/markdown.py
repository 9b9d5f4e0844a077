"""Words and tables of a card, as Markdown shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

HUB = "https://huggingface.co"


def one_line(text: str) -> str:
    """`text` without line breaks and other control characters, and such that UTF-8 can hold it."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.encode("utf-8", "replace").decode("utf-8").split())


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
