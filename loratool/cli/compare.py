"""`loratool compare`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.cli.options import (
    answer_options,
    base_option,
    components_option,
    expert_b_layout_option,
    full_option,
    include_option,
    layer_option,
    threads_option,
    weight_option,
)
from loratool.cli.told import told_options
from loratool.errors import ReaderGone

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("compare", short_help="How adapters relate to each other.")
@click.argument("adapters", nargs=-1, required=True, metavar="A B...")
@weight_option()
@click.option("--equal", is_flag=True, help="Exit with 3 unless all do the same as the first.")
@click.option(
    "--tolerance", type=float, default=0.001, show_default=True, metavar="SHARE",
    help="Relative difference up to which two deltas are equal.",
)  # fmt: skip
@base_option("Base model: counts new singular directions (intruders); slow for large matrices.")
@components_option()
@told_options
@expert_b_layout_option()
@layer_option()
@include_option()
@full_option()
@threads_option()
@answer_options(pages=True)
@click.pass_context
def compare_command(
    context: click.Context,
    adapters: tuple[str, ...],
    weights: tuple[Weight, ...],
    equal: bool,
    tolerance: float,
    base: str | None,
    components: tuple[str, ...],
    told: Sequence[Told],
    expert_b_layout: str | None,
    layers: str | None,
    include: tuple[str, ...],
    full: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Show how adapters relate: the same, scaled, related, unrelated, in conflict.

    cos is the cosine of the deltas. writes and reads are the overlap of their
    column and row spaces (0: orthogonal, 100%: one contains the other). "A in sum"
    is how much of A, taken with its weight, the weighted sum of all holds along A:
    1 all of it, more where the others add to it, 0 where they cancel it. Norms and
    cosines are of the deltas without weights.

    \b
    Examples:
      loratool compare style/ task/
      loratool compare a/ b/ c/ --weight 0.5 --weight 0.5 --weight 1
      loratool compare adapter/ converted/ --equal --tolerance 0.001
      loratool compare style/ task/ --base base/ --layer 0-3
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.compare import compare_sheet
    from loratool.verbs.compare import compare

    with common.progress_bar(forms.talk, "comparing", counted=True) as progress:
        report = compare(
            adapters, weights=weights or None, tolerance=tolerance, base=base,
            components=components, told=told, expert_b_layout=expert_b_layout, layers=layers,
            include=include, threads=threads, progress=progress,
        )  # fmt: skip
    with suppress(ReaderGone):  # the answer stands, also where its reader has gone
        forms.show(report, compare_sheet(report, full, equal))
    context.exit(3 if equal and not report.equal else 0)
