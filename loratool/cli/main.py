"""The command line: the group of all commands, and what happens to errors and signals."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import NoReturn

import click

from loratool.cli.card import card_command
from loratool.cli.combine import combine_command
from loratool.cli.compare import compare_command
from loratool.cli.completion import VARIABLE, completion_command
from loratool.cli.convert import convert_command
from loratool.cli.dequantise import dequantise_command
from loratool.cli.extract import extract_command
from loratool.cli.failures import show_traceback, unexpected
from loratool.cli.finish import finish_command
from loratool.cli.inspect import inspect_command
from loratool.cli.lint import lint_command
from loratool.cli.list import list_command
from loratool.cli.merge import merge_command
from loratool.cli.mistakes import in_one_style, with_meaning
from loratool.cli.options import CONTEXT, Commands
from loratool.cli.process import INTERRUPTED, leave, prepare, say, was_interrupted
from loratool.cli.push import push_command
from loratool.cli.resize import resize_command
from loratool.cli.unmerge import unmerge_command
from loratool.cli.verify import verify_command
from loratool.cli.versions import versions_text
from loratool.errors import AnswerLost, LoraToolError, ReaderGone
from loratool.text import json_text, printable
from loratool.words import counted


def _show_versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from loratool.rendering.terminal import print_file

        print_file(versions_text("--json" in sys.argv) + "\n")
        context.exit()


@click.group(cls=Commands, context_settings=CONTEXT)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_versions,
    help="Show the versions of loratool and of what it works with, also with --json.",
)  # fmt: skip
def cli() -> None:
    """Inspect, merge, combine, resize, compare, extract and publish LoRA adapters.

    Works on files, here or on the Hugging Face Hub (org/name): no model is loaded,
    memory stays flat, and an output appears complete or not at all.

    \b
    Examples:
      loratool inspect adapter/
      loratool list loras/
      loratool merge base/ adapter/ -o merged/ --reversible
      loratool verify merged/ --base base/ adapter/
      loratool unmerge merged/ adapter/ -o base-again/
      loratool compare style/ task/
      loratool combine style/ task/ --weight 0.7 --weight 0.5 -o both/
      loratool resize adapter/ --rank 8 -o smaller/
      loratool extract base/ tuned/ --rank 16 -o adapter/
      loratool dequantise llama-bnb-4bit/ -o plain/
      loratool lint adapter/ --for vllm,llamacpp
      loratool push adapter/ org/adapter
    """


for command in (
    inspect_command,
    list_command,
    merge_command,
    verify_command,
    unmerge_command,
    combine_command,
    resize_command,
    compare_command,
    convert_command,
    extract_command,
    dequantise_command,
    lint_command,
    finish_command,
    push_command,
    card_command,
    completion_command,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; no traceback reaches a user."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        prepare()
        _set_libraries(arguments)
        code = _answer(arguments)
    except (KeyboardInterrupt, click.Abort):
        say(_interrupted(arguments))
        code = INTERRUPTED
    leave(code)


def _set_libraries(arguments: list[str]) -> None:
    if {"--json", "-q", "--quiet"} & set(arguments):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Each retry would be a warning with a signed link in it; our errors say what matters.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="huggingface_hub")
    # Work is spread over our own threads; BLAS threads beside them would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _answer(arguments: list[str]) -> int:
    """Run the command; what goes wrong becomes words on stderr and an exit code."""
    as_json = "--json" in arguments
    failure: LoraToolError
    try:
        # A command that says no exits with a code; click hands it over as the result.
        code: int = (
            cli.main(arguments or ["--help"], prog_name="loratool", standalone_mode=False) or 0
        )
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except ReaderGone:
        return 0
    except (KeyboardInterrupt, click.Abort):
        raise
    except SystemExit as stop:  # so click ends where a pipe is closed: its own, if it printed help
        if VARIABLE in os.environ:  # and so after it answered a shell
            return int(stop.code or 0)
        if {"-h", "--help", "--version"} & set(arguments):
            return 0
        failure = _in_words(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), arguments)
    except BaseException as error:  # a panic in a library of Rust is no Exception
        if was_interrupted():
            raise KeyboardInterrupt from error
        show_traceback(error)
        if isinstance(error, OSError) and (lost := _stdout_refuses()):
            if isinstance(lost, BrokenPipeError):
                return 0
            failure = AnswerLost(lost.strerror or str(lost))
        else:
            failure = _in_words(error, arguments)
    # Outside of `except`: the memory that the work held until it failed is free again.
    return _fail(failure, as_json)


def _in_words(error: BaseException, arguments: list[str]) -> LoraToolError:
    name = next((a for a in arguments if a in cli.commands), None)
    if isinstance(error, LoraToolError):
        return with_meaning(error, cli.commands.get(name or ""), arguments)
    if isinstance(error, click.ClickException):
        return in_one_style(error, arguments, name)
    return unexpected(error, name or "loratool")


def _stdout_refuses() -> OSError | None:
    """The reason why stdout does not take what was written to it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _interrupted(arguments: list[str]) -> str:
    """What is true after Ctrl-C."""
    from loratool.storage.placing import placed_outputs

    if "--dry-run" in arguments:
        return "interrupted; nothing was written"
    if arguments[:1] == ["push"] or "--push" in arguments:
        return "interrupted; the main branch has all of it or nothing; the same command goes on"
    for output in placed_outputs():
        return f"interrupted; {printable(str(output))} is complete"
    if left := _left():
        return f"interrupted; {left}"
    return "interrupted; no unfinished output is left behind"


def _left() -> str:
    """What an ended run has left to go on with, in words; "" where there is nothing."""
    from loratool.storage.presence import left_work

    for folder, done, count in left_work():
        where = printable(str(folder))
        finished = f"{done} of {counted(count, 'file')} are" if count else "a part is"
        return (
            f"{finished} finished and wait{'' if count else 's'} in {where}; "
            "the same command goes on (or remove that folder)"
        )
    return ""


def _fail(error: LoraToolError, as_json: bool) -> int:
    if as_json:
        say(json_text(error.to_dict(), encoding=sys.stderr.encoding))
        return error.exit_code
    try:
        from loratool.rendering.terminal import print_error

        if left := _left():
            error.hint = f"{error.hint} {left[0].upper()}{left[1:]}.".strip()
        print_error(error)
    except Exception:  # no memory for colours either
        say("\n".join(f"{what}: {text}" for what, text in _parts(error)))
    return error.exit_code


def _parts(error: LoraToolError) -> list[tuple[str, str]]:
    return [("error", error.message), ("hint", error.hint)][: 2 if error.hint else 1]
