"""`loratool unmerge`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.cli.options import (
    answer_options,
    base_option,
    dry_run_option,
    expert_b_layout_option,
    model_dtype_option,
    output_option,
    overwrite_option,
    split_options,
    threads_option,
    weight_option,
)
from loratool.cli.told import told_options
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("unmerge", short_help="Take adapters out of a merged model.")
@click.argument("merged")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@output_option(required=True)
@weight_option("What an adapter was merged with, once for each. [default: as recorded, else 1.0]")
@base_option("Originals, complete or in part: what is there is copied, the rest subtracted.")
@click.option(
    "--subtract", is_flag=True, help="Do without the undo file: near the base, not exact."
)
@model_dtype_option("Dtype where it is subtracted. [default: the base's, if known]")
@told_options
@expert_b_layout_option()
@overwrite_option("Replace OUT if it is there.")
@split_options()
@dry_run_option("Say what would be done and lost; write nothing.")
@threads_option()
@answer_options()
def unmerge_command(
    merged: str,
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[Weight, ...],
    base: str | None,
    subtract: bool,
    dtype: str | None,
    told: Sequence[Told],
    expert_b_layout: str | None,
    overwrite: Overwrite,
    restart: bool,
    worker: str | None,
    ray: str | None,
    dry_run: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Take adapters out of a merged model.

    What `loratool merge --reversible` wrote gives the base back bit for bit: give
    all the adapters that were merged, and the hash of every tensor is checked. From
    other models the deltas are subtracted, which comes near the base only.

    \b
    Examples:
      loratool unmerge merged/ adapter/ -o base/
      loratool unmerge merged/ style/ task/ -o base/ --dry-run
      loratool unmerge merged/ style/ -o without-style/ --subtract
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.unmerge import unmerge_sheet
    from loratool.verbs.unmerge import unmerge as run

    with common.progress_bar(forms.talk and not dry_run, "unmerging") as progress:
        report = run(
            merged, adapters, output, weights=weights or None, base=base, dtype=dtype,
            told=told, expert_b_layout=expert_b_layout, subtract=subtract, overwrite=overwrite,
            dry_run=dry_run, restart=restart, worker=worker,
            ray=ray, threads=threads, progress=progress,
        )  # fmt: skip
    forms.show(report, unmerge_sheet(report))
