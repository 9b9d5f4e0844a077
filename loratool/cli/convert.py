"""`loratool convert`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.cli.options import (
    answer_options,
    base_option,
    choice_options,
    dry_run_option,
    factor_dtype_option,
    full_option,
    max_rank_option,
    output_option,
    overwrite_option,
    restart_option,
    threads_option,
)
from loratool.cli.told import one_told, told_options
from loratool.storage.destination import Overwrite


class _Entry(click.ParamType):  # type: ignore[type-arg]
    """KEY=VALUE as a pair of texts."""

    name = "entry"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r}: write KEY=VALUE.", param, ctx)
        return key, text


if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("convert", short_help="Write an adapter in another dialect.")
@click.argument("adapter")
@output_option(required=True)
@click.option(
    "--to", metavar="DIALECT",
    help="What to make: peft, mlx, gguf, litgpt or torchtune. [default: what it is already]",
)  # fmt: skip
@base_option("The base model, where names, row orders or products depend on it.")
@factor_dtype_option("Dtype of the factors. [default: their own]")
@max_rank_option("No module may have more; what would is refused, or cut with --allow-lossy.")
@click.option("--allow-lossy", is_flag=True, help="Cut to --max-rank, and say what that costs.")
@click.option(
    "--set-metadata", multiple=True, type=_Entry(), metavar="KEY=VALUE",
    help="Put this into the header of the new file; repeatable. Alone it changes nothing else.",
)  # fmt: skip
@choice_options()
@told_options
@overwrite_option()
@restart_option()
@dry_run_option("Report what would become of each module; write nothing.")
@full_option()
@threads_option()
@answer_options()
def convert_command(
    adapter: str,
    output: str,
    to: str | None,
    base: str | None,
    dtype: str | None,
    max_rank: int | None,
    allow_lossy: bool,
    set_metadata: tuple[tuple[str, str], ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    told: Sequence[Told],
    overwrite: Overwrite,
    restart: bool,
    dry_run: bool,
    full: bool,
    threads: int | None,
    forms: Forms,
) -> None:
    """Write an adapter in another dialect, exactly or not at all.

    Reads everything that the other commands read. Each module is exact, rounded
    (with the largest error), expanded to another rank, or refused; if anything is
    refused nothing is written. The new file is read again and its products are
    compared with those of the old one.

    \b
    Examples:
      loratool convert mlx-adapter/ --to peft -o adapter/
      loratool convert adapter/ --to gguf --base base/ -o gguf/
      loratool convert lora.pth --alpha 16 --base base/ --to peft -o adapter/
      loratool convert adapter/ --to mlx --dry-run -o mlx/
      loratool convert adapter/ --exclude lm_head -o without-head/
      loratool convert adapter/ --set-metadata license=apache-2.0 -o labelled/
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.convert import convert_sheet
    from loratool.verbs.convert import convert as run

    with common.progress_bar(forms.talk, "converting", counted=True) as progress:
        report = run(
            adapter, output, to=to, base=base, dtype=dtype, max_rank=max_rank,
            allow_lossy=allow_lossy, set_metadata=dict(set_metadata),
            include=include, exclude=exclude,
            told=one_told(told), overwrite=overwrite, dry_run=dry_run, restart=restart,
            threads=threads, progress=progress,
        )  # fmt: skip
    forms.show(report, convert_sheet(report, full))
