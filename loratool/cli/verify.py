"""`loratool verify`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.cli.options import (
    allow_unmatched_option,
    answer_options,
    base_option,
    choice_options,
    components_option,
    expert_b_layout_option,
    full_option,
    initial_option,
    ray_option,
    replicate_layers_option,
    threads_option,
    weight_option,
)
from loratool.cli.told import told_options
from loratool.errors import ReaderGone

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("verify", short_help="Check whether a model is base + adapters.")
@click.argument("merged")
@base_option("The model before the merge.", required=True)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@weight_option("Factor of an adapter, once for each, in their order. [default: 1.0]")
@allow_unmatched_option("Check what fits when parts of an adapter do not.")
@components_option()
@choice_options()
@told_options
@expert_b_layout_option()
@initial_option()
@replicate_layers_option()
@full_option("One line per module; do not fold layers.")
@ray_option()
@threads_option()
@answer_options(pages=True)
@click.pass_context
def verify_command(
    context: click.Context,
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    weights: tuple[Weight, ...],
    allow_unmatched: bool,
    components: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    told: Sequence[Told],
    expert_b_layout: str | None,
    initial: str | None,
    replicate_layers: bool,
    full: bool,
    ray: str | None,
    threads: int | None,
    forms: Forms,
) -> None:
    """Check whether MERGED is BASE with the adapters merged into it, by any tool.

    Exits with 0 for yes, 3 for no, 1 if it cannot be decided. For every module it
    shows the applied weight (1: merged, 0: not, 2: twice), the share of values
    equal to the once-rounded result, what rounding lost of the delta, and what
    the adapters do not explain.

    \b
    Examples:
      loratool verify merged/ --base base/ adapter/
      loratool verify merged/ --base base/ style/ task/ --weight 0.7 --weight 0.4
      loratool verify merged/ --base base/ adapter/ --include 'self_attn.*'
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.verify import verify_sheet
    from loratool.verbs.verify import verify as run

    with common.progress_bar(forms.talk, "verifying") as progress:
        report = run(
            merged, base, adapters, weights=weights or None, allow_unmatched=allow_unmatched,
            components=components, include=include, exclude=exclude, told=told,
            expert_b_layout=expert_b_layout, initial=initial,
            replicate_layers=replicate_layers,
            ray=ray, threads=threads, progress=progress,
        )  # fmt: skip
    with suppress(ReaderGone):  # the answer stands, also where its reader has gone
        forms.show(report, verify_sheet(report, full))
    context.exit(0 if report.verdict == "yes" else 3)
