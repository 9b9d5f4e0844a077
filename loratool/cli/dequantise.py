"""`loratool dequantise`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import (
    answer_options,
    dry_run_option,
    model_dtype_option,
    no_keep_option,
    output_option,
    overwrite_option,
    private_option,
    shard_push_option,
    shard_size_option,
    split_options,
    threads_option,
)
from loratool.storage.destination import Overwrite

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("dequantise", short_help="Write the plain model of a quantised one.")
@click.argument("base")
@output_option()
@model_dtype_option(
    "Dtype of all floating tensors of the output; base is the model's own 16-bit one. [default: "
    "float16; bfloat16 for architectures that exceed it]"
)
@overwrite_option("Replace OUT, or the weights in REPO, if there.")
@shard_size_option()
@click.option("--verify", is_flag=True, help="Read the output again and check every value.")
@shard_push_option()
@no_keep_option()
@private_option("With --push: create the repository private.")
@split_options()
@dry_run_option("Say what would be written; write nothing.")
@threads_option()
@answer_options()
def dequantise_command(
    base: str,
    output: str | None,
    dtype: str | None,
    overwrite: Overwrite,
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
) -> None:
    """Write the plain 16-bit model that a quantised BASE stands for.

    BASE is a model directory, one weights file, or a Hub id: bitsandbytes (NF4,
    FP4, int8), FP8, compressed-tensors, ModelOpt, MXFP4, NVFP4, GPTQ, AWQ, HQQ or
    torchao. No quantisation library is needed; the values are theirs, rounded once.

    \b
    Examples:
      loratool dequantise llama-bnb-4bit/ -o plain/
      loratool dequantise org/model-FP8 -o plain/ --dtype bfloat16 --max-shard-size 5GB
      loratool dequantise gpt-oss/ -o plain/ --dtype base --dry-run
      loratool dequantise org/model-FP8 --push org/model --no-keep
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.dequantise import dequantise_sheet
    from loratool.verbs.dequantise import dequantise as run

    with common.progress_bar(forms.talk and not dry_run, "dequantising") as progress:
        report = run(
            base, output, dtype=dtype, overwrite=overwrite, dry_run=dry_run, restart=restart,
            worker=worker, ray=ray, verify=verify, max_shard_size=max_shard_size,
            push=push, keep=not no_keep, private=private, threads=threads, progress=progress,
        )  # fmt: skip
    forms.show(report, dequantise_sheet(report))
