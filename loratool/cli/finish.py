"""`loratool finish`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import answer_options, overwrite_option, threads_option
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("finish", short_help="Complete an output that workers have made.")
@click.argument("output", metavar="OUT")
@overwrite_option("Replace OUT if it is there. [default: as the workers were told]")
@threads_option()
@answer_options()
def finish_command(output: str, overwrite: Overwrite, threads: int | None, forms: Forms) -> None:
    """Put an output into its place that workers have made, file by file.

    The last worker does so by itself; this is for when it was killed in the middle
    of that. Index, config, tokenizer, loratool.json and the undo file are written,
    and OUT appears. If files are still missing they are named, and nothing is done;
    an OUT that is complete stays as it is.

    \b
    Examples:
      loratool merge base/ adapter/ -o merged/ --worker 1/2
      loratool merge base/ adapter/ -o merged/ --worker 2/2
      loratool finish merged/
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.sheets import sheet_for
    from loratool.verbs.finish import finish as run

    with common.progress_bar(forms.talk, "finishing") as progress:
        report = run(output, overwrite=overwrite or None, threads=threads, progress=progress)
    forms.show(report, sheet_for(report))
