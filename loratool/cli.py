"""The command line: one thin callback per verb, which parses, calls the library and shows."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

import click

from loratool import __version__
from loratool.errors import LoraToolError, UsageError
from loratool.options import CONTEXT, Commands, Dtype, json_option, quiet_option


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loratool")
def cli() -> None:
    """Inspect LoRA adapter checkpoints, merge them, prove a merge, take it back.

    Works on files: no model is loaded, memory stays flat, and an output appears
    complete or not at all.

    \b
    Examples:
      loratool inspect adapter/
      loratool merge base/ adapter/ -o merged/ --reversible
      loratool verify merged/ --base base/ adapter/
      loratool unmerge merged/ adapter/ -o base-again/
    """


@cli.command(short_help="Show what is in an adapter.")
@click.argument("source")
@click.option("--base", help="Base model: adds coverage and ‖ΔW‖/‖W‖.", metavar="BASE")
@click.option("--full", is_flag=True, help="One line per module; do not fold layers.")
@click.option("--tensors", is_flag=True, help="List the raw tensors too.")
@click.option("--spectrum", is_flag=True, help="Show each module's singular values.")
@click.option("--layer", "layers", metavar="N[-M][,…]", help="Only modules of these layers.")
@click.option(
    "--include", multiple=True, metavar="GLOB",
    help="Only modules whose path ends like GLOB, e.g. 'self_attn.*'. Repeatable.",
)  # fmt: skip
@json_option
@quiet_option
def inspect(
    source: str,
    base: str | None,
    full: bool,
    tensors: bool,
    spectrum: bool,
    layers: str | None,
    include: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what is in an adapter: modules, ranks, scales, norms, and what is odd.

    SOURCE is an adapter directory or a weights file (.safetensors, .bin, .pt).
    Norms come from the r × r core of each module, never from the dense product.

    \b
    Examples:
      loratool inspect adapter/
      loratool inspect adapter_model.safetensors --layer 0-3 --include 'q_proj'
      loratool inspect adapter/ --base base/ --json
    """
    from loratool.console import common
    from loratool.console.inspect import show_inspect
    from loratool.inspecting import inspect as run

    report = run(source, base=base, spectrum=spectrum, layers=layers, include=include)
    if as_json:
        common.print_json(report.to_dict())
        return
    show_inspect(report, full, tensors, spectrum)
    if not quiet:
        common.print_warnings(report.warnings)


@cli.command(short_help="Merge adapters into a base model.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write.")
@click.option(
    "--weight", "weights", multiple=True, type=float, metavar="W",
    help="Factor of an adapter, once for each, in their order; may be negative. [default: 1.0]",
)  # fmt: skip
@click.option(
    "--dtype", type=Dtype(), default="float16", show_default=True,
    metavar="float16|bfloat16|float32|base",
    help="Dtype of all floating tensors of the output; base keeps each tensor's own.",
)  # fmt: skip
@click.option(
    "--allow-unmatched", is_flag=True,
    help="Merge what fits when parts of an adapter do not, and record the rest.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option(
    "--reversible", is_flag=True,
    help="Also write what `loratool unmerge` needs to give the base back bit for bit.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Read the output again and check every value.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads. [default: the cores]")
@json_option
@quiet_option
@click.option("-v", "--verbose", is_flag=True, help="List every merged tensor.")
def merge(
    base: str,
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[float, ...],
    dtype: str,
    allow_unmatched: bool,
    overwrite: bool,
    reversible: bool,
    verify: bool,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge one or more LoRA adapters into a base model: W + Σ weight·scale·B·A.

    BASE is a model directory (safetensors or pytorch_model.bin, sharded or not)
    or one weights file. Each ADAPTER is a PEFT adapter directory or file. All
    sums are taken in float32 and rounded once.

    \b
    Examples:
      loratool merge base/ adapter/ -o merged/
      loratool merge base/ style/ task/ --weight 0.7 --weight 0.4 -o merged/
      loratool merge base/ adapter/ -o merged/ --dtype base --dry-run
      loratool merge base/ adapter/ -o merged/ --reversible --verify
    """
    from loratool.console import common
    from loratool.console.merge import show_merge
    from loratool.merging import merge as run

    with common.progress_bar(not (quiet or as_json or dry_run), "merging") as progress:
        report = run(
            base, adapters, output, weights=weights or None, dtype=dtype,
            allow_unmatched=allow_unmatched, overwrite=overwrite, dry_run=dry_run,
            reversible=reversible, verify=verify, threads=threads, progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(report.to_dict())
        return
    show_merge(report, verbose)
    if not quiet:
        common.print_warnings(report.warnings)


@cli.command("verify", short_help="Check whether a model is base + adapters.")
@click.argument("merged")
@click.option("--base", required=True, metavar="BASE", help="The model before the merge.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--weight", "weights", multiple=True, type=float, metavar="W",
    help="Factor of an adapter, once for each, in their order. [default: 1.0]",
)  # fmt: skip
@click.option(
    "--allow-unmatched", is_flag=True, help="Check what fits when parts of an adapter do not."
)
@click.option("--full", is_flag=True, help="One line per module; do not fold layers.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads. [default: the cores]")
@json_option
@quiet_option
@click.pass_context
def verify_command(
    context: click.Context,
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    allow_unmatched: bool,
    full: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check whether MERGED is BASE with the adapters merged into it, by any tool.

    Exits with 0 for yes, 3 for no, 1 if there is no telling. For every module it
    shows the applied weight (1: merged, 0: not, 2: twice), the share of values
    equal to the once-rounded result, what rounding lost of the delta, and what
    the adapters do not explain.

    \b
    Examples:
      loratool verify merged/ --base base/ adapter/
      loratool verify merged/ --base base/ style/ task/ --weight 0.7 --weight 0.4
    """
    from loratool.console import common
    from loratool.console.verify import show_verify
    from loratool.verifying import verify as run

    with common.progress_bar(not (quiet or as_json), "verifying") as progress:
        report = run(
            merged, base, adapters, weights=weights or None, allow_unmatched=allow_unmatched,
            threads=threads, progress=progress,
        )  # fmt: skip
    try:
        if as_json:
            common.print_json(report.to_dict())
        else:
            show_verify(report, full)
            if not quiet:
                common.print_warnings(report.warnings)
    finally:  # the answer stands, even where the reader of the words has gone
        context.exit(0 if report.verdict == "yes" else 3)


@cli.command(short_help="Take adapters out of a merged model.")
@click.argument("merged")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write.")
@click.option(
    "--weight", "weights", multiple=True, type=float, metavar="W",
    help="What an adapter was merged with, once for each. [default: as recorded, else 1.0]",
)  # fmt: skip
@click.option(
    "--base", metavar="BASE",
    help="Originals, complete or in part: what is there is copied, the rest subtracted.",
)  # fmt: skip
@click.option(
    "--subtract", is_flag=True, help="Do without the undo file: near the base, not exact."
)
@click.option(
    "--dtype", type=Dtype(), metavar="float16|bfloat16|float32|base",
    help="Dtype where it is subtracted. [default: the base's, as far as it is known]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and lost; write nothing.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads. [default: the cores]")
@json_option
@quiet_option
def unmerge(
    merged: str,
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[float, ...],
    base: str | None,
    subtract: bool,
    dtype: str | None,
    overwrite: bool,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Take adapters out of a merged model.

    What `loratool merge --reversible` wrote gives the base back bit for bit: give
    all the adapters that were merged, and every tensor's sha256 is checked. From
    other models the deltas are subtracted, which comes near the base only.

    \b
    Examples:
      loratool unmerge merged/ adapter/ -o base/
      loratool unmerge merged/ style/ task/ -o base/ --dry-run
      loratool unmerge merged/ style/ -o without-style/ --subtract
    """
    from loratool.console import common
    from loratool.console.unmerge import show_unmerge
    from loratool.unmerging import unmerge as run

    with common.progress_bar(not (quiet or as_json or dry_run), "unmerging") as progress:
        report = run(
            merged, adapters, output, weights=weights or None, base=base, dtype=dtype,
            subtract=subtract, overwrite=overwrite, dry_run=dry_run, threads=threads,
            progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(report.to_dict())
        return
    show_unmerge(report)
    if not quiet:
        common.print_warnings(report.warnings)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; no traceback reaches a user."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    # Work is spread over our own threads; BLAS threads beside them would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A terminal that cannot show a character gets a "?" for it, not a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill cleans up like Ctrl-C
    code = 0
    try:
        # A command that says no exits with a code; click hands it over as the result.
        code = cli.main(arguments, prog_name="loratool", standalone_mode=False) or 0
        sys.stdout.flush()
    except LoraToolError as error:
        code = _fail(error, as_json)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        if as_json:
            code = _fail(UsageError(error.format_message(), "See loratool --help."), as_json)
        else:
            error.show()
            code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; no unfinished output is left behind", err=True)
        code = 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: the answer could not be printed ({error.strerror})\n")
            os._exit(1)
        # The reader (head, less) has seen enough. Keep the interpreter from complaining at exit.
        sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    _exit(code)


def _interrupt(*_: object) -> NoReturn:
    """Stop, once: a second Ctrl-C must not stop the cleaning up after the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _exit(code: int) -> NoReturn:
    """End the process. With torch imported, taking it down in order takes longer than a fsync."""
    if "torch" in sys.modules:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(error: LoraToolError, as_json: bool) -> int:
    if as_json:
        sys.stderr.write(json.dumps(error.to_dict(), ensure_ascii=False) + "\n")
    else:
        from loratool.console.common import print_error

        print_error(error)
    return error.exit_code
