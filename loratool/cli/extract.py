"""`loratool extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import (
    answer_options,
    dry_run_option,
    energy_option,
    exclude_option,
    factor_dtype_option,
    full_option,
    include_option,
    max_rank_option,
    output_option,
    overwrite_option,
    patterns_option,
    rank_option,
    seed_option,
    spectrum_option,
    split_options,
    threads_option,
    uniform_option,
)
from loratool.paths import GROUPS
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("extract", short_help="Make an adapter of a fine-tune minus its base.")
@click.argument("base")
@click.argument("tuned")
@output_option("Directory to write; none for --dry-run.")
@rank_option("This rank for every module.")
@energy_option()
@click.option(
    "--budget", metavar="SIZE", help="The largest rank for which the file is no larger than this."
)
@max_rank_option("No module gets more than this, with --energy or --budget.")
@patterns_option(
    "Each module with a rank of its own (rank_pattern): the smallest by --energy, or those "
    "with the smallest total error by --budget. PEFT and vLLM read that; llama.cpp and Ollama "
    "compute it wrongly, SGLang, LoRAX and TGI refuse it."
)
@uniform_option()
@include_option("Only modules whose path, or a dotted end of it, matches; may be repeated.")
@exclude_option()
@click.option(
    "--skip", multiple=True, type=click.Choice(GROUPS), metavar="GROUP",
    help="Leave all of a kind out: norms, biases, embeddings, convs, heads or others; repeatable.",
)  # fmt: skip
@click.option(
    "--save", multiple=True, metavar="GLOB",
    help="Save these modules whole instead of as factors; norms or biases for all of these, "
         "which are left out otherwise. May be repeated.",
)  # fmt: skip
@click.option(
    "--embeddings", is_flag=True,
    help="Embeddings too, which are left out otherwise: factors for those of tokens, and for a "
         "head that is the same matrix; others whole.",
)  # fmt: skip
@click.option(
    "--keep-noise", is_flag=True,
    help="Keep tensors that differ by no more than what their dtypes round off.",
)  # fmt: skip
@factor_dtype_option("Dtype of the factors.", default="float16", show_default=True)
@click.option(
    "--base-name", metavar="NAME",
    help="base_model_name_or_path for the config. [default: the base's Hub id, or its path]",
)  # fmt: skip
@click.option("--exact", is_flag=True, help="Full decompositions; slow for large matrices.")
@seed_option()
@click.option("--verify", is_flag=True, help="Read back: how far is base + adapter from TUNED?")
@click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute."
)
@overwrite_option()
@split_options()
@dry_run_option("Measure how much changed; decompose nothing.")
@spectrum_option()
@full_option()
@threads_option()
@answer_options(pages=True)
def extract_command(
    base: str,
    tuned: str,
    output: str | None,
    rank: int | None,
    energy: float | None,
    budget: str | None,
    max_rank: int | None,
    patterns: bool,
    uniform: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    skip: tuple[str, ...],
    save: tuple[str, ...],
    embeddings: bool,
    keep_noise: bool,
    dtype: str,
    base_name: str | None,
    exact: bool,
    seed: int,
    verify: bool,
    device: str,
    overwrite: Overwrite,
    restart: bool,
    worker: str | None,
    ray: str | None,
    dry_run: bool,
    spectrum: bool,
    full: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Make a LoRA adapter of a fine-tuned model minus its base.

    Linear layers and convolutions become low-rank factors, the best ones of their rank,
    with one rank for all. Norms and biases are left out unless --save asks for them, and
    embeddings unless --embeddings does, because servers refuse or drop them; the rest is
    saved whole. What differs by rounding alone is left out. All of it is listed with its
    share of the change. PEFT loads the result, and merge merges it. One of --rank, --energy
    and --budget is needed.

    The report: kept and held are shares of ‖ΔW‖², the squared change, and error is
    √(1 - kept). noise is what TUNED's dtype rounded off, which no rank brings back.
    s.rank is the stable rank: how many directions of equal size make up the change.

    \b
    Examples:
      loratool extract base/ tuned/ --rank 16 -o adapter/
      loratool extract base/ tuned/ --energy 0.9 --max-rank 128 -o adapter/
      loratool extract base/ tuned/ --budget 50MB --verify -o adapter/
      loratool extract base/ tuned/ --rank 16 --save norms -o adapter/
      loratool extract base/ tuned/ --rank 16 --embeddings -o adapter/
      loratool extract base/ tuned/ --dry-run
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.extract import extract_sheet
    from loratool.verbs.extract import extract

    with common.progress_bar(forms.talk, "extracting") as progress:
        report = extract(
            base, tuned, output, rank=rank, energy=energy, budget=budget, max_rank=max_rank,
            uniform=uniform, patterns=patterns, include=include, exclude=exclude, skip=skip,
            save=save, embeddings=embeddings, keep_noise=keep_noise, dtype=dtype,
            base_name=base_name, exact=exact, seed=seed, verify=verify, device=device,
            overwrite=overwrite, dry_run=dry_run, restart=restart, worker=worker, ray=ray,
            threads=threads, progress=progress,
        )  # fmt: skip
    document = report.to_dict()
    if not spectrum:
        for module in document["modules"]:
            del module["singular_values"]
    forms.show(report, extract_sheet(report, full, spectrum), document)
