"""Show what `catalog` found: a table of adapters and models, and what is wrong with some."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Sequence

from loratool.cataloguing.entry import CatalogEntry
from loratool.dtypes import dtype_name
from loratool.sheet import (
    Bars,
    Facts,
    Sheet,
    SheetLine,
    SheetTable,
    Tone,
    Toned,
    Words,
)
from loratool.text import csv_cell
from loratool.verbs.list import CatalogReport
from loratool.words import counted, format_bytes, number_text

#: Columns for the widest place, and those that go first where there is less room.
_HEADINGS = ("name", "what", "base", "r", "scale", "modules", "values", "size", "dtype", "date",
             "words", "state")  # fmt: skip
_SPARE = ("words", "dtype", "values", "modules", "scale", "date", "base")
#: How many of these may go before names are shortened; each try measures all lines.
_LESS = (0, 3, 5)
_NUMERIC = frozenset({"modules", "values", "size"})

#: Characters of a name, a base, a duplicate's first and words in the table; JSON and CSV have all.
_NAME, _BASE, _TWIN, _PHRASE = 28, 16, 14, 24

_STATES: dict[str, Toned] = {
    "damaged": Toned("damaged", "bad"),
    "unreadable": Toned("unreadable", "bad"),
    "not-read": Toned("not read", "warning"),
    "not-finite": Toned("NaN or infinity", "bad"),
    "does-nothing": Toned("does nothing", "warning"),
    "refused": Toned("cannot merge", "warning"),
    "recognised": Toned("named only", "dim"),
}

#: The fields of an entry as columns of CSV, in this order.
CSV_COLUMNS = (
    "path", "kind", "dialect", "base", "family", "ranks", "scales", "modules", "parameters",
    "bytes", "dtypes", "quantised", "state", "duplicate_of", "trained", "trained_from", "triggers",
    "tags", "message", "label",
)  # fmt: skip

#: States whose reason is told.
_TOLD = ("damaged", "unreadable", "not-read", "not-finite")

#: Reasons that are told in full; the table and `--json` have the others.
_REASONS = 20


def list_sheet(report: CatalogReport) -> Sheet:
    """The table, what is wrong with entries, and how many there are."""
    sheet = Sheet("list", subject=str(report.source))
    facts = Facts()
    facts.add("listed", report.source)
    sheet.add(facts)
    if report.entries:
        sheet.add(_table(report.entries))
    _add_sizes(sheet, report.entries)
    _add_reasons(sheet, report.entries)
    sheet.say(_total(report))
    _add_legend(sheet, report)
    sheet.notices = report.warnings
    return sheet


def csv_text(report: CatalogReport) -> str:
    """All entries as CSV with a line of headings; several values of a cell have "; " between."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for entry in report.entries:
        writer.writerow([_csv_value(getattr(entry, name)) for name in CSV_COLUMNS])
    return text.getvalue()


def _csv_value(value: object) -> object:
    if isinstance(value, int | float):
        return value
    if isinstance(value, dict):
        value = [f"{name} {count}" for name, count in value.items()]
    if isinstance(value, list):
        return value[0] if _is_number(value) else csv_cell("; ".join(map(str, value)))
    return csv_cell("" if value is None else str(value))


def _is_number(values: Sequence[object]) -> bool:
    return len(values) == 1 and isinstance(values[0], int | float)


def _table(entries: Sequence[CatalogEntry]) -> SheetTable:
    """The table without the columns that nobody has anything in. Where names are too long for it,
    some columns go first, and then the names are shortened."""
    lines = [_cells(entry) for entry in entries]
    used = tuple(h for h in _HEADINGS if any(line[h] not in ("", "–") for line in lines))
    choices = [tuple(h for h in used if h not in _SPARE[:count]) for count in _LESS]
    shortened = [("name…", *used[1:])] if any(len(e.path) > _NAME for e in entries) else []
    table = SheetTable((*choices, *shortened), spare=_SPARE, numeric=_NUMERIC)
    times = Counter(shortened_path(entry.path, _NAME) for entry in entries)
    for entry, line in zip(entries, lines, strict=True):
        short = shortened_path(entry.path, _NAME)
        line["name…"] = short if times[short] == 1 else entry.path
        table.lines.append(SheetLine(line))
    return table


def _cells(entry: CatalogEntry) -> dict[str, Words]:
    scales = [number_text(scale) for scale in entry.scales]
    return {
        "name": entry.path,
        "what": (entry.kind == "adapter" and entry.dialect) or entry.kind,
        "base": _shortened(_base_of(entry), _BASE),
        "r": _span(list(map(str, entry.ranks))),
        "scale": _span(scales),
        "modules": "–" if entry.modules is None else f"{entry.modules}",
        "values": "–" if entry.parameters is None else _count_text(entry.parameters),
        "size": "–" if entry.bytes is None else format_bytes(entry.bytes),
        "dtype": entry.quantised or _dtype_of(entry),
        "date": _date_of(entry),
        "words": _shortened(", ".join(entry.triggers or entry.tags), _PHRASE),
        "state": _state_of(entry),
    }


def _span(values: Sequence[str]) -> str:
    """ "8", or "8–64" of several."""
    if not values:
        return "–"
    return values[0] if values[0] == values[-1] else f"{values[0]}–{values[-1]}"


def _base_of(entry: CatalogEntry) -> str:
    """The name of the base, without its owner where that makes it fit; else the architecture."""
    name = entry.base if entry.kind == "adapter" else entry.family or entry.base
    name = name or entry.family
    return name if len(name) <= _BASE else name.rstrip("/").rpartition("/")[2]


def _dtype_of(entry: CatalogEntry) -> str:
    most = entry.dtype
    return dtype_name(most.removesuffix("+")) + "+" * most.endswith("+")


def _date_of(entry: CatalogEntry) -> str:
    if entry.trained is None:
        return ""
    return ("" if entry.trained_from == "metadata" else "≤ ") + entry.trained[:10]


def _state_of(entry: CatalogEntry) -> Words:
    parts: list[Toned] = []
    if entry.state:
        parts.append(_STATES[entry.state])
    if entry.duplicate_of is not None:
        tone: Tone = "warning"
        parts.append(Toned(f"= {shortened_path(entry.duplicate_of, _TWIN)}", tone))
    if not parts:
        return ""
    return tuple(piece for part in parts for piece in (Toned(", ", "plain"), part))[1:]


def _add_sizes(sheet: Sheet, entries: Sequence[CatalogEntry]) -> None:
    """Where the bytes are, as bars by dialect, if there are several."""
    sums: dict[str, int] = defaultdict(int)
    for entry in entries:
        sums[entry.dialect if entry.kind == "adapter" else entry.kind] += entry.bytes or 0
    if len(sums) > 1:
        labels = sorted(sums, key=lambda label: -sums[label])
        sheet.add(Bars("Size", labels, "bytes", [("bytes", [sums[n] for n in labels])], log_y=True))


def _add_reasons(sheet: Sheet, entries: Sequence[CatalogEntry]) -> None:
    """What is wrong with each of those that no verb could use, one line each."""
    told = [e for e in entries if e.message and e.state in _TOLD]
    for entry in told[:_REASONS]:
        sheet.say(Toned(f"{entry.path}: ", "strong"), _reason(entry))
    if len(told) > _REASONS:
        sheet.say(f"… and {len(told) - _REASONS} more; --json has what is wrong with each.")
    waiting = [entry for entry in entries if entry.state == "refused"]
    if waiting:
        text = counted(len(waiting), "adapter", "cannot")
        codes = sorted({code for entry in waiting for code in entry.refused})
        sheet.say(
            Toned(f"{text} be merged as it is" if len(waiting) == 1 else
                  f"{text} be merged as they are", "warning"),
            f" ({', '.join(codes)}); loratool inspect says why.",
        )  # fmt: skip


def _reason(entry: CatalogEntry) -> str:
    """What is wrong, without the path again that its line begins with, and on one line."""
    first = entry.message.partition("\n")[0].removeprefix(entry.label)
    return first.lstrip("/").removeprefix(": ").rstrip(":")


def _total(report: CatalogReport) -> str:
    kinds, left_out = report.kinds, report.found - len(report.entries)
    if not report.found:
        return f"No adapter and no model: {counted(report.others, 'other file')}."
    if not report.entries:
        return f"None of {counted(report.found, 'entry')} is what was asked for."
    words = [
        counted(kinds[kind], noun)
        for kind, noun in (("adapter", "adapter"), ("model", "model"), ("other", "other file"))
        if kinds.get(kind)
    ]
    text = ", ".join(words) + f": {format_bytes(report.nbytes)}"
    copies = sum(entry.bytes or 0 for entry in report.entries if entry.duplicate_of is not None)
    text += f", of which duplicates {format_bytes(copies)}" if copies else ""
    text += f"; {left_out} left out" if left_out else ""
    return f"{text}."


def _add_legend(sheet: Sheet, report: CatalogReport) -> None:
    if any(entry.trained and entry.trained_from != "metadata" for entry in report.entries):
        what = "the file" if report.values_read else "the repository"
        sheet.say(Toned(f"≤: {what} changed last then; training ended before.", "dim"))
    if any(entry.state == "recognised" for entry in report.entries):
        text = "named only: its dialect is known, and no verb reads it; it was not looked into."
        sheet.say(Toned(text, "dim"))
    if not report.values_read and report.entries:
        text = (
            "No weights were downloaded: duplicates, and adapters that do nothing, are not known."
        )
        sheet.say(Toned(text, "dim"))


def shortened_path(path: str, most: int) -> str:
    """A path with its beginning and its end, which tell most."""
    if len(path) <= most:
        return path
    head = most // 3
    return f"{path[:head]}…{path[-(most - head - 1) :]}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _count_text(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M", "B"):
        if number < 999.5 or unit == "B":
            return f"{number:.3g}{unit}" if number < 999.5 else f"{number:,.0f}{unit}"
        number /= 1000
    raise AssertionError(number)
