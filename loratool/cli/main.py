"""The command line: the group of all commands, and what happens to errors and signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import NoReturn

import click

from loratool.cli.card import card_command
from loratool.cli.combine import combine_command
from loratool.cli.compare import compare_command
from loratool.cli.extract import extract_command
from loratool.cli.inspect import inspect_command
from loratool.cli.merge import merge_command
from loratool.cli.options import CONTEXT, Commands
from loratool.cli.push import push_command
from loratool.cli.resize import resize_command
from loratool.cli.unmerge import unmerge_command
from loratool.cli.verify import verify_command
from loratool.errors import LoraToolError, ReaderGone, UsageError
from loratool.storage.hub.patience import is_left_behind
from loratool.version import __version__

_INTERRUPTED = 130


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loratool")
def cli() -> None:
    """Inspect, merge, combine, resize, compare, extract and publish LoRA adapters.

    Works on files, here or on the Hugging Face Hub (org/name): no model is loaded,
    memory stays flat, and an output appears complete or not at all.

    \b
    Examples:
      loratool inspect adapter/
      loratool merge base/ adapter/ -o merged/ --reversible
      loratool verify merged/ --base base/ adapter/
      loratool unmerge merged/ adapter/ -o base-again/
      loratool compare style/ task/
      loratool combine style/ task/ --weight 0.7 --weight 0.5 -o both/
      loratool resize adapter/ --rank 8 -o smaller/
      loratool extract base/ tuned/ --rank 16 -o adapter/
      loratool push adapter/ org/adapter
    """


for command in (
    inspect_command,
    merge_command,
    verify_command,
    unmerge_command,
    combine_command,
    resize_command,
    compare_command,
    extract_command,
    push_command,
    card_command,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; no traceback reaches a user."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    if as_json or {"-q", "--quiet"} & set(arguments):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Each retry would be a warning with a signed link in it; our errors say what matters.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="huggingface_hub")
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
        left = "no unfinished output is left behind"
        if arguments[:1] == ["push"] or "--push" in arguments:
            left = "the main branch is as it was; the same command goes on from here"
        click.echo(f"interrupted; {left}", err=True)
        code = _INTERRUPTED
    except ReaderGone:
        _keep_quiet()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: the answer could not be printed ({error.strerror})\n")
            os._exit(1)
        _keep_quiet()
    _exit(code)


def _keep_quiet() -> None:
    """The reader (head, less) has seen enough: keep the interpreter from complaining at exit."""
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115


def _interrupt(*_: object) -> NoReturn:
    """Stop, once: a second Ctrl-C must not stop the cleaning up after the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _exit(code: int) -> NoReturn:
    """End the process. With torch imported, taking it down in order takes longer than a fsync; and
    after Ctrl-C threads may still be computing what nobody wants any more."""
    if "torch" in sys.modules or code == _INTERRUPTED or is_left_behind():
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(error: LoraToolError, as_json: bool) -> int:
    if as_json:
        sys.stderr.write(json.dumps(error.to_dict(), ensure_ascii=False) + "\n")
    else:
        from loratool.rendering.terminal import print_error

        print_error(error)
    return error.exit_code
