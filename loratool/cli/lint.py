"""`loratool lint`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import answer_options, base_option

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("lint", short_help="Say which servers load an adapter as it is.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@base_option("The base model: settles what depends on it, and plans a merge into it.")
@click.option(
    "--for", "programs", multiple=True, metavar="NAME[,…]",
    help="Only these programs, and exit 3 unless they load every ADAPTER: vllm, sglang, llamacpp, "
         "lorax, tgi, exllama, ollama, peft-hotswap, mlx. Repeatable.",
)  # fmt: skip
@click.option(
    "--together", is_flag=True,
    help="May one server have all of them? Says how to start it, and what keeps them apart.",
)  # fmt: skip
@click.option(
    "--max-rank", type=click.IntRange(1), metavar="N",
    help="What the server was started with, as vLLM's --max-lora-rank. [default: 16, vLLM's; with "
         "--together what all of them need]",
)  # fmt: skip
@answer_options(pages=True)
def lint_command(
    adapters: tuple[str, ...],
    base: str | None,
    programs: tuple[str, ...],
    together: bool,
    max_rank: int | None,
    forms: Forms,
) -> int:
    """Say which servers load an adapter as it is, and what mends it where they do not.

    For each program: it loads the adapter; it loads it and computes something else,
    mostly with no message; or it refuses it. Each with the reason and, where one helps,
    the loratool command after which it loads. The rules are those in the programs' own
    sources, of the versions shown (docs/serving.md).

    With --for, or --base for merge, the exit code is 3 unless all that was asked for
    loads and computes what PEFT does: a check for CI. Only headers are read, and with
    --base the adapter's values.

    \b
    Examples:
      loratool lint adapter/
      loratool lint adapter/ --for vllm,llamacpp --base base/
      loratool lint runs/*/adapter --for vllm --max-rank 64 --json
      loratool lint style/ task/ --together --for sglang
    """
    from loratool.rendering.lint import lint_sheet
    from loratool.rendering.terminal import print_error
    from loratool.verbs.lint import lint

    names = [name.strip() for given in programs for name in given.split(",")]
    report = lint(adapters, base=base, programs=names, together=together, max_rank=max_rank)
    for error in report.unread:
        if not forms.as_json:
            print_error(error)
    forms.show(report, lint_sheet(report))
    if report.unread:
        return report.unread[-1].exit_code
    return 0 if report.passes else 3
