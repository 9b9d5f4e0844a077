"""`loratool push`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.cli.options import (
    answer_options,
    base_id_option,
    dry_run_option,
    exclude_option,
    include_option,
    private_option,
)
from loratool.cli.told import one_told, told_options

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("push", short_help="Upload an adapter or a merged model to the Hub.")
@click.argument("path")
@click.argument("repo_id", metavar="REPO_ID")
@private_option("Create the repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to. [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("-m", "--message", metavar="TEXT", help="Message of the commit.")
@base_id_option()
@told_options
@include_option(
    "Upload these files though they look like secrets or training files, or are links out of "
    "PATH; may be repeated."
)
@exclude_option("Leave these files here; may be repeated.")
@dry_run_option("Compare with what is there; upload nothing.")
@answer_options()
def push_command(
    path: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    base: str | None,
    told: Sequence[Told],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    forms: Forms,
) -> None:
    """Upload the adapter or the merged model in PATH to REPO_ID (org/name), in one commit.

    The repository is created if it is not there. Files that it has already, by
    hash, are not uploaded again. A model card is made, or completed without
    changing what somebody wrote: see `loratool card`.

    Incomplete outputs, adapters that cannot be used, files that look like secrets
    and files of a training run are refused. The login is that of
    `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      loratool push adapter/ org/adapter --dry-run
      loratool push adapter/ org/adapter --private
      loratool push merged/ org/merged -m "Merge style at 0.7"
      loratool push adapter/ other/adapter --create-pr
    """
    from loratool.rendering.push import push_sheet
    from loratool.verbs.push import push

    report = push(
        path, repo_id, private=private, revision=revision, create_pr=create_pr, message=message,
        base=base, told=one_told(told), include=include, exclude=exclude, dry_run=dry_run,
    )  # fmt: skip
    forms.show(report, push_sheet(report))
