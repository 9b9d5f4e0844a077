"""`loratool merge`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.cli.options import (
    allow_unmatched_option,
    answer_options,
    choice_options,
    components_option,
    dry_run_option,
    expert_b_layout_option,
    initial_option,
    model_dtype_option,
    no_keep_option,
    output_option,
    overwrite_option,
    private_option,
    replicate_layers_option,
    shard_push_option,
    shard_size_option,
    split_options,
    threads_option,
    weight_option,
)
from loratool.cli.told import told_options
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("merge", short_help="Merge adapters into a base model.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@output_option()
@weight_option()
@model_dtype_option(
    "Dtype of all floating tensors of the output; base keeps each tensor's own. [default: float16; "
    "bfloat16 for architectures that exceed it]"
)
@allow_unmatched_option()
@components_option()
@choice_options()
@told_options
@expert_b_layout_option()
@initial_option()
@replicate_layers_option()
@click.option(
    "--quantised", type=click.Choice(["plain", "keep", "requantise"]),
    help="What becomes of a quantised BASE: all of it plain, all but adapted weights kept as they "
    "are, or adapted weights quantised again. [default: kept; plain for NF4, FP4 and int8]",
)  # fmt: skip
@click.option(
    "--trained-here", is_flag=True,
    help="The adapter was trained on this very BASE, whose weights are rescaled (AWQ).",
)  # fmt: skip
@click.option(
    "--force", is_flag=True,
    help="With --quantised requantise: also into formats of 4 bits and fewer, which keep little of "
    "an adapter.",
)  # fmt: skip
@click.option(
    "--tokenizer", type=click.Choice(["base", "adapter"]),
    help="Whose the output gets, all of it. [default: an adapter's if it brings one]",
)  # fmt: skip
@click.option("--again", is_flag=True, help="Merge an adapter that BASE holds already.")
@overwrite_option("Replace OUT, or the weights in REPO, if there.")
@click.option(
    "--reversible", is_flag=True,
    help="Also write what `loratool unmerge` needs to give the base back bit for bit.",
)  # fmt: skip
@shard_size_option()
@click.option("--verify", is_flag=True, help="Read the output again and check every value.")
@shard_push_option()
@no_keep_option()
@private_option("With --push: create the repository private.")
@split_options()
@dry_run_option("Print the plan; write nothing.")
@threads_option()
@answer_options()
@click.option("-v", "--verbose", is_flag=True, help="List every merged tensor.")
def merge_command(
    base: str,
    adapters: tuple[str, ...],
    output: str | None,
    weights: tuple[Weight, ...],
    dtype: str | None,
    allow_unmatched: bool,
    components: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    told: Sequence[Told],
    expert_b_layout: str | None,
    initial: str | None,
    replicate_layers: bool,
    quantised: str | None,
    trained_here: bool,
    force: bool,
    tokenizer: str | None,
    again: bool,
    overwrite: Overwrite,
    reversible: bool,
    max_shard_size: str | None,
    verify: bool,
    push: str | None,
    no_keep: bool,
    private: bool,
    restart: bool,
    worker: str | None,
    ray: str | None,
    dry_run: bool,
    threads: int | None,
    forms: Forms,
    verbose: bool,
) -> None:
    """Merge one or more LoRA adapters into a base model: W + Σ weight·scale·B·A.

    BASE is a model directory (safetensors or pytorch_model.bin, sharded or not),
    one weights file, or a Hub id. Each ADAPTER is a PEFT adapter directory, file
    or Hub id. All sums are taken in float32 and rounded once.

    With --push the model appears on the Hub in one commit, at the end; the shards
    wait on a branch until then, and a run that was stopped goes on where it was.
    With --no-keep too, neither base nor result need fit on the disk.

    \b
    Examples:
      loratool merge base/ adapter/ -o merged/
      loratool merge base/ style/ task/ --weight 0.7 --weight 0.4 -o merged/
      loratool merge base/ adapter/ --weight 1,0.5@layers.0-3 -o merged/
      loratool merge base/ adapter/ -o merged/ --dtype base --dry-run
      loratool merge base/ adapter/ -o merged/ --reversible --verify
      loratool merge base/ adapter/ -o merged/ --include 'self_attn.*'
      loratool merge base/ adapter/ -o merged/ --max-shard-size 5GB
      loratool merge llama-bnb-4bit/ qlora/ -o merged/ --dtype bfloat16
      loratool merge clip/ text-adapter/ -o merged/ --components text_model
      loratool merge org/base org/adapter -o merged/ --push org/merged
      loratool merge org/base org/adapter --push org/merged --no-keep
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.merge import merge_sheet
    from loratool.verbs.merge import merge as run

    with common.progress_bar(forms.talk and not dry_run, "merging") as progress:
        report = run(
            base, adapters, output, weights=weights or None, dtype=dtype,
            allow_unmatched=allow_unmatched, components=components,
            include=include, exclude=exclude,
            told=told, expert_b_layout=expert_b_layout,
            initial=initial, replicate_layers=replicate_layers,
            quantised=quantised, trained_here=trained_here, force=force, tokenizer=tokenizer,
            again=again, overwrite=overwrite, dry_run=dry_run, restart=restart, worker=worker,
            ray=ray, reversible=reversible, max_shard_size=max_shard_size,
            verify=verify, push=push, keep=not no_keep, private=private, threads=threads,
            progress=progress,
        )  # fmt: skip
    forms.show(report, merge_sheet(report, verbose))
