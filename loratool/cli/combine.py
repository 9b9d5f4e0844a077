"""`loratool combine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.cli.options import (
    answer_options,
    base_option,
    choice_options,
    dry_run_option,
    energy_option,
    factor_dtype_option,
    full_option,
    output_option,
    overwrite_option,
    rank_option,
    seed_option,
    threads_option,
    weight_option,
)
from loratool.cli.told import told_options
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("combine", short_help="Make one adapter of several.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@output_option(required=True)
@weight_option()
@click.option(
    "--method", default="sum", show_default=True, metavar="NAME", help="How to combine; see above."
)
@rank_option("Cut every module to this rank.")
@energy_option("Cut to the smallest rank that keeps this share of ‖ΔW‖² in every module.")
@click.option(
    "--density", type=float, metavar="SHARE",
    help="Share of the values that ties, dare and magnitude_prune keep.",
)  # fmt: skip
@click.option(
    "--majority-sign-method", default="total", show_default=True, metavar="total|frequency",
    help="How ties elects a sign: by the sum of the values, or of their signs (ties are positive: "
    "use it with an odd number of adapters).",
)  # fmt: skip
@seed_option("For dare.")
@click.option(
    "--saved", default="refuse", show_default=True, metavar="refuse|first|last|mean",
    help="What to take where adapters hold the same tensor whole, with different values.",
)  # fmt: skip
@click.option(
    "--patterns", "--keep-patterns", "keep_patterns", is_flag=True,
    help="Each module with its own rank (rank_pattern), not all with the largest.",
)  # fmt: skip
@choice_options()
@told_options
@base_option("The base model, where the adapters' row orders or products depend on it.")
@factor_dtype_option()
@overwrite_option()
@dry_run_option()
@full_option()
@threads_option()
@answer_options(pages=True)
def combine_command(
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[Weight, ...],
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    majority_sign_method: str,
    seed: int,
    saved: str,
    keep_patterns: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    told: Sequence[Told],
    base: str | None,
    dtype: str | None,
    overwrite: Overwrite,
    dry_run: bool,
    full: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Make one adapter of several, from their factors alone.

    Ranks, scales, targets and dtypes may differ. The result is a PEFT directory
    with one rank, alpha = rank, and the scale in the factors.

    \b
    Methods (those with * need --density):
      sum         Σ weight·scale·B·A exactly, at the smallest rank that holds it
      svd         the same, cut to the largest rank among the adapters
      cat         the same, stacked along the rank
      linear, ties*, dare_linear*, dare_ties*, magnitude_prune*
                  on the A and the B apart, as in PEFT (cross terms)
      ties_svd*, dare_linear_svd*, dare_ties_svd*, magnitude_prune_svd*
                  on the dense deltas, as in PEFT (slow)
      ties_core*, dare_linear_core*, dare_ties_core*
                  in Core Space (arXiv 2509.17786), of balanced factors
      tsv_m       task singular vectors made orthogonal (arXiv 2412.00081)
      iso_c       the sum, cut if asked, with equal singular values
                  (arXiv 2502.04959)
      knots_ties* TIES in the common basis of KnOTS (arXiv 2410.19735)

    Weights matter as much as methods: three adapters at weight 1 each often
    overshoot, and 0.5 each is a better start. Weight -1 is weight 1 on the
    negated adapter, also where ties elects signs.

    \b
    Examples:
      loratool combine style/ task/ -o both/
      loratool combine style/ task/ --weight 0.7 --weight -0.4 --rank 16 -o both/
      loratool combine style/ task/ --include 'self_attn.*' -o attention/
      loratool combine a/ b/ c/ --method ties_core --density 0.5 -o abc/
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.combine import combine_sheet
    from loratool.verbs.combine import combine

    with common.progress_bar(forms.talk, "combining", counted=True) as progress:
        report = combine(
            adapters, output, weights=weights or None, method=method, rank=rank, energy=energy,
            density=density, majority_sign_method=majority_sign_method, seed=seed, saved=saved,
            keep_patterns=keep_patterns, told=told, base=base, dtype=dtype,
            include=include, exclude=exclude,
            overwrite=overwrite, dry_run=dry_run,
            threads=threads, progress=progress,
        )  # fmt: skip
    forms.show(report, combine_sheet(report, full))
