"""`loratool resize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.cli.options import (
    answer_options,
    base_option,
    dry_run_option,
    energy_option,
    factor_dtype_option,
    full_option,
    max_rank_option,
    output_option,
    overwrite_option,
    patterns_option,
    rank_option,
    threads_option,
    uniform_option,
)
from loratool.cli.told import told_options
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("resize", short_help="Change the rank of an adapter.")
@click.argument("adapter")
@output_option(required=True)
@rank_option("This rank for every module, up or down.")
@energy_option()
@click.option(
    "--sv-ratio", type=float, metavar="R",
    help="The smallest rank that has every module's singular values above σ₁/R (kohya).",
)  # fmt: skip
@click.option(
    "--sv-fro", type=float, metavar="SHARE",
    help="The smallest rank with this share of √Σσ² in every module (kohya); 0.9 is energy 0.81.",
)  # fmt: skip
@click.option(
    "--sv-cumulative", type=float, metavar="SHARE",
    help="The smallest rank with this share of Σσ in every module (kohya).",
)  # fmt: skip
@click.option(
    "--noise", is_flag=True,
    help="The smallest rank that has every module's singular values above its noise edge.",
)  # fmt: skip
@max_rank_option()
@click.option(
    "--pad-to", type=int, metavar="N",
    help="Raise the rank to the next multiple of N; filled up with zeros at the end.",
)  # fmt: skip
@patterns_option()
@uniform_option()
@told_options
@base_option("The base model, where the adapters' row orders or products depend on it.")
@factor_dtype_option()
@overwrite_option()
@dry_run_option()
@full_option()
@threads_option()
@answer_options(pages=True)
def resize_command(
    adapter: str,
    output: str,
    rank: int | None,
    energy: float | None,
    sv_ratio: float | None,
    sv_fro: float | None,
    sv_cumulative: float | None,
    noise: bool,
    max_rank: int | None,
    pad_to: int | None,
    patterns: bool,
    uniform: bool,
    told: Sequence[Told],
    base: str | None,
    dtype: str | None,
    overwrite: Overwrite,
    dry_run: bool,
    full: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Change the rank of an adapter, keeping the largest singular values.

    No other adapter of the new rank is nearer to the old one. All modules get one rank,
    the largest that a module needs. The table shows, per module, the old and the new
    rank and the share of ‖ΔW‖² kept.

    The scale goes into the factors: alpha is the rank, and use_rslora is false. So resize
    to the same rank makes an rsLoRA adapter fit for llama.cpp, Ollama and SGLang, which
    compute rsLoRA with a wrong scale.

    The noise edge is where the singular values of random factors of the same shape end
    (Marchenko and Pastur). A module whose spectrum has no flat part like that is not cut
    by --noise.

    \b
    Examples:
      loratool resize adapter/ --rank 8 -o smaller/
      loratool resize adapter/ --energy 0.99 --max-rank 32 -o smaller/
      loratool resize adapter/ --energy 0.95 --pad-to 16 -o padded/
      loratool resize adapter/ --sv-ratio 10 --dry-run -o smaller/
      loratool resize adapter/ --noise --patterns -o smaller/
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.resize import resize_sheet
    from loratool.verbs.resize import resize

    with common.progress_bar(forms.talk, "resizing", counted=True) as progress:
        report = resize(
            adapter, output, rank=rank, energy=energy, sv_ratio=sv_ratio, sv_fro=sv_fro,
            sv_cumulative=sv_cumulative, noise=noise, max_rank=max_rank, pad_to=pad_to,
            uniform=uniform, patterns=patterns, told=told, base=base, dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run, threads=threads, progress=progress,
        )  # fmt: skip
    forms.show(report, resize_sheet(report, full))
