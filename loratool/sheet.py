"""What an answer says, in no form yet: facts, tables, sentences and charts.

Each report becomes a sheet in the module of its command, once; `terminal`, `page` and `plots` draw
it. Texts from files go in as they are: each form makes them fit to be shown in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from loratool.notices import Notice
from loratool.paths import pattern, ranged, split

#: How something is meant; what that looks like is for each form to say.
Tone = Literal["plain", "strong", "good", "bad", "warning", "dim", "section"]


@dataclass(frozen=True)
class Toned:
    """A text with a tone of its own."""

    text: str
    tone: Tone


#: What stands in one place: a text, or parts of it one after the other.
Words = str | Toned | tuple[str | Toned, ...]


def strong(text: str) -> Toned:
    return Toned(text, "strong")


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

Piece = Facts | SheetTable | Sentence | Line | Chart


@dataclass
class Sheet:
    """An answer: the command's name, its pieces from top to bottom, what was odd; of what it is.

    Where the notices go is for each form to say: a terminal has stderr for them.
    """

    title: str
    pieces: list[Piece] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    subject: str = ""

    def add(self, *pieces: Piece) -> None:
        self.pieces += pieces

    def say(self, *words: str | Toned, apart: bool = False) -> None:
        self.pieces.append(Sentence(words, apart))

    @property
    def charts(self) -> list[Chart]:
        return [piece for piece in self.pieces if isinstance(piece, HeatMap | Curves | Bars)]


#: A module's report: what it is called, and what the commands' tables are made of.
Item = TypeVar("Item")


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
    groups: dict[Any, list[Item]] = {}
    for number, item in enumerate(items):
        key = number if full else (pattern(path(item)), alike(item))
        groups.setdefault(key, []).append(item)
    lines = []
    section = ""
    for group in groups.values():
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
