"""Numbers in words, for terminals, pages and cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loratool.text import printable


def format_bytes(count: float) -> str:
    """1234567 -> "1.23 MB" (decimal units, three significant digits)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def format_seconds(seconds: float) -> str:
    """40 -> "40 s", 200 -> "3 min", 9000 -> "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def number_text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def span_text(values: Sequence[float | None], digits: int = 2) -> str:
    """ "0.12" for one value, "0.12–0.34" for several that differ."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = number_text(min(known), digits), number_text(max(known), digits)
    return number_text(known[0]) if len(known) == 1 else low if low == high else f"{low}–{high}"


def percent(share: float) -> str:
    """Three digits where they matter: 100 % only if nothing is missing from it."""
    if 0.9995 < share < 1:
        return "<100%"
    if 0 < share < 0.00005:
        return "<0.01%"
    if share >= 9.995:
        return f"{100 * share:,.0f}%"
    return f"{100 * share:.3g}%" if share >= 0.0995 else f"{100 * share:.2g}%"


#: Verbs whose plural is not the singular without its s.
_PLURALS = {"is": "are", "was": "were", "has": "have", "does": "do", "matches": "match"}
#: Nouns whose plural is not the singular with an s.
_NOUNS = {"index": "indexes", "match": "matches", "matrix": "matrices"}


def counted(number: int, noun: str, verb: str = "") -> str:
    """ "1 module", "3 modules"; with a verb in the singular "1 module has", "3 modules have"."""
    return f"{number:,} {noun if number == 1 else _plural(noun)}" + (
        f" {agreeing(number, verb)}" if verb else ""
    )


def agreeing(number: int, verb: str) -> str:
    """A verb in the singular, as it agrees with so many."""
    return verb if number == 1 else _PLURALS.get(verb, verb.removesuffix("s"))


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return _NOUNS.get(noun, f"{noun}s")


def by_number(name: str) -> list[str | int]:
    """What names are sorted by, so that checkpoint-1000 comes behind checkpoint-200."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]{1,300})", name)]


def shape_text(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def enumerated(items: Sequence[str], shown: int = 8) -> str:
    """ "a, b and c", or the first ones and how many there are beside them."""
    names = [printable(item) for item in items[:shown]]
    if len(items) > shown:
        return ", ".join(names) + f" and {len(items) - shown} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
