"""Tables, progress and messages on a terminal; one module per verb shows its report.

stdout carries the answer, stderr the conversation: progress, warnings, errors, hints.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from loratool.errors import AnswerLost, LoraToolError, ReaderGone
from loratool.notices import Notice
from loratool.paths import pattern, ranged, split
from loratool.text import escaped, json_text, printable, printable_message
from loratool.words import counted, format_bytes, number_text

#: What stands for "[" and "\\" of a name until Rich has read its markup. They are of Unicode's
#: private use, so no text that was made printable holds them.
_BRACKET, _BACKSLASH = "\ue000", "\ue001"
_HIDE = str.maketrans({"[": _BRACKET, "\\": _BACKSLASH})
_SHOW = str.maketrans({_BRACKET: "[", _BACKSLASH: "\\"})


def verbatim(text: str) -> str:
    """Text that comes from a file, a path or the Hub, for a string that has markup of ours.

    It is shown on one line, as it is: no control characters, no markup, no emoji codes.
    """
    return printable(text).translate(_HIDE)


def verbatim_message(text: str) -> str:
    """The same of an error's or a notice's text, which may have the lines of a list."""
    return printable_message(text).translate(_HIDE)


class _Console(Console):
    """A console that shows no control character, also of a string that `verbatim` did not see.

    Rich makes a text of every string that is printed, measured or in a table by `render_str`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        plain = escaped(text, keep=f"\n{_BRACKET}{_BACKSLASH}")
        rich_text = super().render_str(plain, **options)
        rich_text.plain = rich_text.plain.translate(_SHOW)
        return rich_text

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if not self.stderr:
                raise AnswerLost(error.strerror or str(error)) from None
            self.quiet = True  # who does not hear the conversation can do without

    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which knows the exit code; Rich would exit with 1."""
        if not self.stderr:
            raise ReaderGone
        self.quiet = True


#: From this width on, a table shows kinds, both factor shapes and ranges in every column.
WIDE = 120

#: Below this width only the most important columns are shown, rather than broken ones.
NARROW = 78

out = _Console(highlight=False, emoji=False, soft_wrap=False)
err = _Console(stderr=True, highlight=False, emoji=False)


def print_json(document: dict[str, Any]) -> None:
    _print_exactly(json_text(document, indent=2, encoding=sys.stdout.encoding) + "\n")


def print_file(text: str) -> None:
    """The text of a file: printable on a terminal, exactly as it is anywhere else."""
    if sys.stdout.isatty():
        lines = escaped(text.replace("\r\n", "\n").expandtabs(4), keep="\n")
        out.print(lines, markup=False, soft_wrap=True, end="")
    else:
        _print_exactly(text)


def _print_exactly(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise AnswerLost(error.strerror or str(error)) from None


def print_error(error: LoraToolError) -> None:
    err.print(f"[bold red]error:[/] {verbatim_message(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[bold cyan]hint:[/] {verbatim_message(error.hint)}", soft_wrap=True)


def print_warnings(notices: Iterable[Notice]) -> None:
    for notice in notices:
        label = "[bold red]cannot merge" if notice.refused else "[bold yellow]warning"
        err.print(
            f"{label}:[/] \\[{notice.code}] {verbatim_message(notice.message)}", soft_wrap=True
        )


@contextmanager
def progress_bar(
    enabled: bool, verb: str, counted: bool = False
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar with bytes and rate, or with modules if `counted`, and the time left, on a terminal;
    nothing elsewhere."""
    if not enabled or not err.is_terminal:
        yield None
        return
    amounts = (MofNCompleteColumn(),) if counted else (DownloadColumn(), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), *amounts,
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    bar = Progress(*columns, console=err, transient=True)
    task = bar.add_task(verb, total=None)
    try:

        def advance(done: int, total: int, label: str) -> None:
            bar.start()  # only now: a download before the work has a bar of its own
            short = verb if counted else re.sub(r"^model-|\.safetensors$", "", label)
            bar.update(task, completed=done, total=total, description=printable(short))

        yield advance
    finally:
        bar.stop()


def spectrum_table(spectra: Sequence[tuple[str, Sequence[float]]], heading: str) -> Table:
    """The singular values of every module as a line of bars, with the first and the last."""
    table = make_table("module", heading, "σ₁", "σᵣ")
    for path, values in spectra:
        first, last = (number_text(values[0]), number_text(values[-1])) if values else ("–", "–")
        table.add_row(verbatim(path), _bars(values), first, last)
    return table


def _bars(values: Sequence[float], width: int = 16) -> str:
    """Singular values as a line of bars, the first one full height."""
    if not values or values[0] <= 0:
        return "–"
    step = max(1, math.ceil(len(values) / width))
    shown = values[::step]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * v / values[0]))] for v in shown)


def fact_grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def make_table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for heading in headings:
        numeric = (
            heading in NUMERIC or heading.endswith(" in sum") or heading.startswith("intruders")
        )
        table.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    return table


#: A terminal on which every table has the width it wants.
_ANY_WIDTH = 1000

#: A module's report: what it is called, and what the commands' tables are made of.
Item = TypeVar("Item")


def folded_table(
    headings: Sequence[str],
    items: Sequence[Item],
    path: Callable[[Item], str],
    alike: Callable[[Item], Any],
    cells: Callable[[list[Item]], dict[str, str]],
    full: bool,
    spare: Sequence[str] = (),
) -> Table:
    """One line per group of modules that are `alike` and differ in the numbers of their path, under
    their layers; one per module if `full`. `cells` gives a group's line by heading.

    Columns in `spare` are left out, the first one first, until the table fits the terminal.
    """
    groups: dict[Any, list[Item]] = {}
    for number, item in enumerate(items):
        key = number if full else (pattern(path(item)), alike(item))
        groups.setdefault(key, []).append(item)
    lines = []
    section = ""
    for group in groups.values():
        head, leaf = split(ranged([path(item) for item in group]))
        if head != section and head:
            lines.append({"module": f"[cyan]{verbatim(head)}[/]"})
        section = head
        lines.append({"module": ("  " if head else "") + verbatim(leaf), **cells(group)})
    left = list(headings)
    while True:
        table = make_table(*left)
        for line in lines:
            table.add_row(*[line.get(heading, "") for heading in left])
        surplus = next((heading for heading in spare if heading in left), None)
        wanted = Measurement.get(out, out.options.update(width=_ANY_WIDTH), table).maximum
        if surplus is None or wanted <= out.width:
            return table
        left.remove(surplus)


def print_sentence(text: str) -> None:
    """A sentence, wrapped on a terminal and whole in a pipe, unless somebody set its width."""
    out.print(text, soft_wrap=not out.is_terminal and "COLUMNS" not in os.environ)


NUMERIC = {"r", "r/α", "alpha", "scale", "‖ΔW‖", "σ₁", "σ₁ max", "stable rank", "s.rank",
            "‖ΔW‖/‖W‖", "weight", "equal", "lost", "unexplained", "values off", "max ulp",
            "max dev.", "ranks", "new r", "‖A‖", "‖B‖", "‖B‖/‖A‖", "cos", "writes", "reads",
            "kept ≥", "error ≤", "off sum ≤", "cos of pairs", "noise ≤"}  # fmt: skip


def written_text(nbytes: int, files: int, seconds: float) -> str:
    # The seconds include the import of torch, which says nothing about small models' speed.
    rate = f" ({format_bytes(nbytes / max(seconds, 1e-9))}/s)" if nbytes > 100e6 else ""
    return f"{format_bytes(nbytes)} in {counted(files, 'file')}, {seconds:.1f} s{rate}"
