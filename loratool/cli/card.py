"""`loratool card`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from loratool.adapters.told import Told
from loratool.cli.options import base_id_option, dry_run_option, json_option, quiet_option
from loratool.cli.told import one_told, told_options


@click.command("card", short_help="Write the model card of an adapter or a merged model.")
@click.argument("path")
@click.option(
    "--repo", "repo_id", metavar="REPO_ID",
    help="Where it will be on the Hub; the card's code loads it from there.",
)  # fmt: skip
@base_id_option()
@told_options
@dry_run_option("Print the card; write nothing.")
@json_option()
@quiet_option()
def card_command(
    path: str,
    repo_id: str | None,
    base: str | None,
    told: Sequence[Told],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write README.md for the adapter or the merged model in PATH.

    The card says what it is, how it was made (from loratool.json), which modules it
    has, how to load it, and how far an extracted or resized adapter is from what it
    stands for. A card that is there is completed: what somebody wrote stays.
    `loratool push` does the same for what it uploads.

    \b
    Examples:
      loratool card adapter/
      loratool card merged/ --repo org/merged
      loratool card adapter/ --dry-run
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.card import show_card
    from loratool.verbs.card import card

    report = card(path, repo_id=repo_id, base=base, told=one_told(told), dry_run=dry_run)
    if as_json:
        common.print_json(report.to_dict())
        return
    show_card(report)
    if not quiet:
        common.print_warnings(report.warnings)
