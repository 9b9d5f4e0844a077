"""`loratool list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import answer_options, threads_option
from loratool.errors import UsageError

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms

_ORDERS = ("name", "size", "rank", "base", "dialect", "date")


@click.command("list", short_help="List the adapters and models below a folder.")
@click.argument("source", default=".", metavar="[PATH|ORG|hf://…]")
@click.option(
    "--sort", type=click.Choice(_ORDERS), default="name", show_default=True,
    help="By what to sort, smallest first.",
)  # fmt: skip
@click.option("--reverse", is_flag=True, help="Sort largest first.")
@click.option(
    "--base", metavar="NAME", help="Only with NAME in the name of the base or its architecture."
)
@click.option("--from", "dialect", metavar="DIALECT", help="Only adapters of this dialect.")
@click.option("--rank", metavar="N|A-B", help="Only adapters of this rank, or of these.")
@click.option(
    "--equal", is_flag=True,
    help="Find equal deltas too, in whatever dialect, rank or dtype. Reads adapters whole that "
         "adapt the same modules.",
)  # fmt: skip
@threads_option()
@click.option("--csv", "as_csv", is_flag=True, help="Print a table for spreadsheets.")
@answer_options(pages=True)
def list_command(
    source: str,
    sort: str,
    reverse: bool,
    base: str | None,
    dialect: str | None,
    rank: str | None,
    equal: bool,
    threads: int | None,
    as_csv: bool,
    forms: Forms,
) -> None:
    """List every adapter and model below a folder, or of a user or an org on the Hub.

    One line each: dialect, base, rank, scale, modules, size, when it was trained and
    the words that call it, as far as its file says. A directory of PEFT, a model in
    shards and a single file are one entry each. What is damaged is named, an adapter
    whose factors are zero "does nothing", and "= NAME" has the weights and scales of
    NAME, byte for byte.

    Only headers and some kilobytes of values are read, whole files where those are
    alike. Of the Hub no weights are downloaded. Hidden folders and links to folders
    are not entered. --csv has exact names, with ' before what a spreadsheet would
    take for a formula.

    \b
    Examples:
      loratool list loras/
      loratool list --sort size --reverse
      loratool list loras/ --base llama --rank 8-64 --csv > loras.csv
      loratool list runs/ --equal
      loratool list hf://org
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.list import csv_text, list_sheet
    from loratool.verbs.list import catalog

    if as_csv and forms.as_json:
        raise UsageError("--csv and --json are two forms of one answer.", "Choose one.")
    with common.progress_bar(forms.talk, "reading", counted=True) as progress:
        report = catalog(
            source, sort=sort, reverse=reverse, base=base, dialect=dialect, rank=rank, equal=equal,
            threads=threads, progress=progress,
        )  # fmt: skip
    sheet = list_sheet(report)
    if not as_csv:
        forms.show(report, sheet)
        return
    common.print_file(csv_text(report))
    if not forms.quiet:
        common.print_warnings(report.warnings)
    forms.write([sheet])
