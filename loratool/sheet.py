"""What an answer or a card says, in no form yet: facts, tables, sentences, code and charts.

Each report becomes a sheet in `rendering`, in the module of its command, and each model card in
`publishing/cards`; terminals, pages, pictures and Markdown are forms that draw it. Texts from files
go in as they are: each form makes them fit to be shown in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loratool.notices import Notice
from loratool.paths import Item, grouped, ranged, split

#: How something is meant; what that looks like is for each form to say.
Tone = Literal["plain", "strong", "good", "bad", "warning", "dim", "section", "code"]

#: Addresses that a link may have: of the web, in characters that end it in no form.
_ADDRESS = re.compile(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", re.ASCII)


@dataclass(frozen=True)
class Toned:
    """A text with a tone of its own; it is a link if `address` is one of the web."""

    text: str
    tone: Tone
    address: str = ""

    @property
    def link(self) -> str:
        return self.address if _ADDRESS.fullmatch(self.address) else ""


#: What stands in one place: a text, or parts of it one after the other.
Words = str | Toned | tuple[str | Toned, ...]


def strong(text: str) -> Toned:
    return Toned(text, "strong")


def code(text: str, address: str = "") -> Toned:
    """A name of a file, an option or a module among words."""
    return Toned(text, "code", address)


def joined_words(*words: Words) -> tuple[str | Toned, ...]:
    """Words one after the other."""
    return tuple(part for some in words for part in (some if isinstance(some, tuple) else (some,)))


def separated(items: Iterable[Words]) -> tuple[str | Toned, ...]:
    return joined_words(*(part for item in items for part in (", ", item)))[1:]


def listed_words(items: Sequence[Words], shown: int = 8) -> tuple[str | Toned, ...]:
    """ "a, b and c" of words that have tones; of texts it is `words.enumerated`."""
    more = [f"{len(items) - shown} more"] * (len(items) > shown)
    *most, last = [*items[:shown], *more] or [""]
    return joined_words(separated(most), *[" and "] * bool(most), last)


def parts_of(words: Words) -> tuple[Toned, ...]:
    """Words as parts that all have a tone."""
    parts = words if isinstance(words, tuple) else (words,)
    return tuple(part if isinstance(part, Toned) else Toned(part, "plain") for part in parts)


def plain_text(words: Words) -> str:
    return "".join(part.text for part in parts_of(words))


@dataclass
class Facts:
    """What, and its value, line by line. A line without a "what" goes on with the one before."""

    rows: list[tuple[str, Words]] = field(default_factory=list)

    def add(self, what: str, words: Words) -> None:
        self.rows.append((what, words))


@dataclass(frozen=True)
class SheetLine:
    """A line of a table by its headings; of a heading that it lacks the cell is empty."""

    cells: dict[str, Words]
    #: The name of what the lines below it have in common, in the first column.
    is_section: bool = False
    tone: Tone = "plain"


@dataclass
class SheetTable:
    """A table with columns for one width or several.

    `headings` lists columns for the widest place first; the first of these lists that fits is
    taken. Where even the last does not fit, columns in `spare` are left out, the first one first.
    """

    headings: tuple[tuple[str, ...], ...]
    lines: list[SheetLine] = field(default_factory=list)
    spare: tuple[str, ...] = ()
    #: Columns of numbers beside those that are called as in `NUMERIC`.
    numeric: frozenset[str] = frozenset()
    caption: str = ""

    def add(self, *cells: Words, tone: Tone = "plain") -> None:
        """A line with a cell for each heading of the widest list."""
        self.lines.append(SheetLine(dict(zip(self.headings[0], cells, strict=True)), tone=tone))

    def is_numeric(self, heading: str) -> bool:
        return (
            heading in NUMERIC
            or heading in self.numeric
            or heading.endswith(" in sum")
            or heading.startswith("intruders")
        )


def table_of(*headings: str, numeric: Iterable[str] = (), caption: str = "") -> SheetTable:
    """A table with the same columns everywhere."""
    return SheetTable((headings,), numeric=frozenset(numeric), caption=caption)


@dataclass(frozen=True)
class Sentence:
    """A sentence or a line of a list; a line is left free above it where it stands `apart`."""

    words: Words
    apart: bool = False


def said(*words: Words) -> Sentence:
    return Sentence(joined_words(*words))


@dataclass(frozen=True)
class Heading:
    """What the pieces below it are about, up to the next heading."""

    text: str


@dataclass(frozen=True)
class Points:
    """Things that are said one by one."""

    items: Sequence[Words]


@dataclass(frozen=True)
class CodeBlock:
    """Lines of a language ("python", "sh") that people copy as they are; they are never wrapped."""

    language: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Line:
    """What people copy as it is, on a line of its own that is never wrapped: a URL."""

    text: str


@dataclass(frozen=True)
class HeatMap:
    """Numbers by row and column, as colours; None where there is none. `unit` says of what."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    #: What the columns are.
    across: str = ""
    #: Where the colours change from one meaning to the other, as 0 of cosines, and how far they go
    #: to both sides at least, so that what is next to nothing looks so; None for magnitudes.
    middle: float | None = None
    reach: float = 1.0


@dataclass(frozen=True)
class Curves:
    """Numbers over numbers, a line for each series: its name, x and y."""

    title: str
    x: str
    y: str
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    log_y: bool = False


@dataclass(frozen=True)
class Bars:
    """A number for each label, one bar beside the other for each series."""

    title: str
    labels: Sequence[str]
    y: str
    series: Sequence[tuple[str, Sequence[float]]]
    log_y: bool = False


Chart = HeatMap | Curves | Bars

Piece = Facts | SheetTable | Sentence | Heading | Points | CodeBlock | Line | Chart


@dataclass
class Sheet:
    """An answer or a card: the command's name, its pieces from top to bottom, what was odd; of what
    it is.

    Where the notices go is for each form to say: a terminal has stderr for them.
    """

    title: str
    pieces: list[Piece] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    subject: str = ""

    def add(self, *pieces: Piece) -> None:
        self.pieces += pieces

    def say(self, *words: Words, apart: bool = False) -> None:
        self.pieces.append(Sentence(joined_words(*words), apart))

    @property
    def charts(self) -> list[Chart]:
        return [piece for piece in self.pieces if isinstance(piece, HeatMap | Curves | Bars)]


def folded_lines(
    items: Sequence[Item],
    path: Callable[[Item], str],
    alike: Callable[[Item], Any],
    cells: Callable[[list[Item]], dict[str, Words]],
    full: bool,
) -> list[SheetLine]:
    """One line per group of modules that are `alike` and differ in the numbers of their path, under
    their layers; one per module if `full`. `cells` gives a group's line by heading; the first
    column is "module"."""
    lines = []
    section = ""
    for group in [[item] for item in items] if full else grouped(items, path, alike):
        head, leaf = split(ranged([path(item) for item in group]))
        if head != section and head:
            lines.append(SheetLine({"module": head}, is_section=True))
        section = head
        lines.append(SheetLine({"module": ("  " if head else "") + leaf, **cells(group)}))
    return lines


NUMERIC = {"r", "r/α", "alpha", "scale", "‖ΔW‖", "σ₁", "σ₁ max", "stable rank", "s.rank",
           "‖ΔW‖/‖W‖", "weight", "equal", "lost", "unexplained", "values off", "max ulp",
           "max dev.", "ranks", "new r", "‖A‖", "‖B‖", "‖B‖/‖A‖", "cos", "writes", "reads",
           "kept ≥", "error ≤", "off sum ≤", "cos of pairs", "noise ≤", "σᵣ"}  # fmt: skip
