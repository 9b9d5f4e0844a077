"""Tables, progress and messages on a terminal; one module per verb shows its report.

stdout carries the answer, stderr the conversation: progress, warnings, errors, hints.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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
from loratool.text import escaped, fitting, json_text, printable, printable_message
from loratool.words import format_bytes, format_seconds

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
        hidden = f"\n{_BRACKET}{_BACKSLASH}"
        plain = fitting(escaped(text, keep=hidden), self.encoding, keep=hidden)
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
        if isinstance(sys.stdout, io.TextIOWrapper):  # files are UTF-8, whatever a terminal shows
            sys.stdout.reconfigure(encoding="utf-8")
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


def say_aside(text: str) -> None:
    """A line on stderr."""
    err.print(verbatim(text), soft_wrap=True)


def print_warnings(notices: Iterable[Notice]) -> None:
    for notice in notices:
        label = "[bold red]cannot merge" if notice.refused else "[bold yellow]warning"
        err.print(
            f"{label}:[/] \\[{notice.code}] {verbatim_message(notice.message)}", soft_wrap=True
        )


@contextmanager
def paged(wanted: bool) -> Iterator[None]:
    """Show what the block prints through the user's pager, if that is wanted and somebody sits at
    a terminal; also where the block ends with an exit code or an error."""
    if not (wanted and out.is_terminal and sys.stdin.isatty()):
        yield
        return
    out.begin_capture()
    try:
        yield
    except KeyboardInterrupt:
        out.end_capture()
        raise
    except BaseException:
        _page(out.end_capture())
        raise
    _page(out.end_capture())


def _page(shown: str) -> None:
    if shown:
        from click import echo_via_pager

        echo_via_pager(shown, color=not out.no_color)


#: Seconds between two lines about how far the work is, where no terminal shows a bar.
LINE_EVERY = 30.0


@contextmanager
def progress_bar(
    enabled: bool, verb: str, counted: bool = False
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar with bytes and rate, or with modules if `counted`, and the time left, on a terminal;
    elsewhere, in a log, the same as a line from time to time."""
    if not enabled or not err.is_terminal:
        yield _lines(verb, counted) if enabled else None
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


def _lines(verb: str, counted: bool) -> Callable[[int, int, str], None]:
    """Says how far the work is each time when LINE_EVERY seconds have passed."""
    began = last = time.monotonic()
    first: int | None = None

    def advance(done: int, total: int, label: str) -> None:
        nonlocal last, first
        first = done if first is None else first  # what an earlier run had finished took no time
        now = time.monotonic()
        if now - last < LINE_EVERY:
            return
        last = now
        rate = (done - first) / max(now - began, 1e-9)
        shown = str if counted else format_bytes
        pace = f"{rate:.3g}" if counted else format_bytes(rate)
        left = f", about {format_seconds((total - done) / rate)} left" if rate > 0 else ""
        what = verb if counted else f"{verb} {label}"
        say_aside(f"{what}: {shown(done)} of {shown(total)}, {pace}/s{left}")

    return advance


def fact_grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
