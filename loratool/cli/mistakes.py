"""What is said of a wrong call: one error in words, with what was probably meant as its hint."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from loratool.errors import (
    NO_MODEL,
    BaseError,
    LoraToolError,
    SeveralMeantError,
    UsageError,
    nearest,
)
from loratool.storage.destination import is_empty_folder
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.text import printable_message

#: What options of other tools, and of memory, are here: an option of the command, or the name of
#: one of its arguments; the first that it has.
_MEANT: dict[tuple[str, ...], str] = {
    ("--output",): "o out out-dir out-file out-path outdir outfile output-dir output-file "
    "output-path save save-as save-dir save-path save-to dest destination",
    ("adapters", "adapter", "sources", "path"): "adapter adapters adapter-dir "
    "adapter-name-or-path adapter-path lora lora-adapter lora-dir lora-model lora-path "
    "lora-weights peft-model peft-model-id peft-path input",
    ("--base", "base"): "base base-model base-model-name base-model-name-or-path base-model-path "
    "base-path model model-name model-name-or-path model-path pretrained-model",
    ("tuned", "merged"): "tuned finetuned fine-tuned finetuned-model merged merged-model",
    ("--weight",): "alpha lora-alpha lora-scale merge-weight multiplier ratio ratios scale scaling "
    "scaling-factor strength weights",
    ("--rank", "--adapter-rank"): "r dim lora-dim lora-r lora-rank network-dim new-rank "
    "target-rank",
    ("--dtype",): "bf16 fp16 fp32 out-dtype outtype precision save-dtype save-precision "
    "torch-dtype",
    ("--overwrite",): "f force y yes clobber exist-ok overwrite-output-dir",
    ("--threads",): "j jobs n-jobs num-threads num-workers workers",
    ("--to",): "format output-format target to-format",
    ("--method",): "algorithm combination-type merge-method mode",
    ("--push", "repo_id", "--repo"): "hub-repo push-to-hub repo repo-id",
}  # fmt: skip
_BY_NAME = {name: there for there, names in _MEANT.items() for name in names.split()}

#: What other tools call a command.
_COMMANDS_MEANT: dict[str, str] = {
    "inspect": "cat describe details info show stat summary view",
    "list": "dir find ls search",
    "merge": "apply bake fuse join merge-and-unload",
    "compare": "cmp diff similarity",
    "convert": "export format transform",
    "combine": "add average mix",
    "resize": "prune reduce shrink truncate",
    "extract": "svd subtract",
    "unmerge": "undo unfuse",
    "verify": "test validate",
    "lint": "check compat doctor",
    "push": "publish upload",
}

#: What is there in no command because there is nothing to choose, by command and option.
_SETTLED = {
    ("extract", "alpha"): "The adapter gets alpha = rank, so that its scale is 1.",
    ("extract", "lora-alpha"): "The adapter gets alpha = rank, so that its scale is 1.",
}

#: Numbers with commas between them: several weights in one.
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_LISTED = re.compile(rf"{_NUMBER}(?:\s*,\s*{_NUMBER})+")


def command_meant(name: str, commands: Sequence[str]) -> str | None:
    """The command that somebody may have meant by a name that is none."""
    plain = name.lower().replace("_", "-")
    for there, names in _COMMANDS_MEANT.items():
        if there in commands and plain in names.split():
            return there
    return nearest(plain, commands)


def in_one_style(
    error: click.ClickException, arguments: Sequence[str], command: str | None = None
) -> UsageError:
    """What click says of a call, of `command` where it is of one, as an error of ours."""
    context = getattr(error, "ctx", None)
    said = _ended(re.sub(r"\s*\n\s*", " ", error.format_message()))
    if context is None:
        return UsageError(said, f"See {' '.join(filter(None, ['loratool', command]))} --help.")
    more = f"See {context.command_path} --help."
    if isinstance(error, click.NoSuchOption):
        hint = _option_meant(error.option_name, context)
        return UsageError(f"No such option {error.option_name}.", f"{hint} {more}".strip())
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        hint = _weights_meant(context.command, arguments) or f"{_choice_meant(said)} {more}".strip()
        return UsageError(said, hint)
    meant = ""
    if isinstance(error, click.MissingParameter):
        if error.param is not None and error.param.name == "output":
            meant = _output_meant(context.command, arguments)
    elif error.message.startswith("Got unexpected extra argument"):
        meant = _output_meant(context.command, arguments)
    return UsageError(said, meant or f"Usage: {_ended(_usage(context))} {more}")


def with_meaning(
    error: LoraToolError, command: click.Command | None, arguments: Sequence[str]
) -> LoraToolError:
    """An error of a verb, its hint in words of the command line where more is known there."""
    if command is not None:
        if isinstance(error, UsageError) and error.message.startswith("No output given"):
            error.hint = _output_meant(command, arguments) or error.hint
        elif isinstance(error, SeveralMeantError):
            error.hint = printable_message(_with_choice(error, arguments) or error.hint)
        elif isinstance(error, BaseError) and error.message.endswith(f": {NO_MODEL}"):
            error.hint = printable_message(_model_meant(error, command, arguments) or error.hint)
        elif hint := _weights_meant(command, arguments):
            error.hint = hint
        elif error.message.partition(": ")[2].startswith(("--alpha", "--scale")) and _has(
            command, "weights"
        ):  # elsewhere alpha is the strength of a merge
            error.hint += " How much of an adapter goes in is --weight."
    return error


def _has(command: click.Command, name: str) -> bool:
    return any(param.name == name for param in command.params)


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."


def _usage(context: click.Context) -> str:
    """The shortest call of a command that can work."""
    params = [p for p in context.command.params if isinstance(p, click.Argument)]
    words = [p.make_metavar(context) for p in params]
    for option in context.command.params:
        if isinstance(option, click.Option) and (option.required or option.name == "output"):
            words.append(f"{option.opts[0]} {option.make_metavar(context)}")
    if isinstance(context.command, click.Group):
        words.append("COMMAND")
    return " ".join([context.command_path, *words])


def _option_meant(name: str, context: click.Context) -> str:
    """What somebody may have meant by an option that is not there."""
    plain = name.lower().lstrip("-").replace("_", "-")
    options = [p for p in context.command.params if isinstance(p, click.Option)]
    known = {o: option for option in options for o in (*option.opts, *option.secondary_opts)}
    arguments = {p.name: p for p in context.command.params if isinstance(p, click.Argument)}
    for there in (f"--{plain}", *_BY_NAME.get(plain, ())):
        if there in known:
            return _did_you_mean(there, known[there], context)
        if there in arguments:
            shown = arguments[there].make_metavar(context)
            return f"{shown} is given without an option: {_ended(_usage(context))}"
    if settled := _SETTLED.get((context.command.name or "", plain)):
        return settled
    if "--output" in (f"--{plain}", *_BY_NAME.get(plain, ())) and "--html" in known:
        return "It only answers: --html FILE keeps that as a page, --json > FILE as data."
    long = [o for o in known if o.startswith("--")]
    near = nearest(f"--{plain}", long) if len(plain) > 1 else None  # one letter is like anything
    return _did_you_mean(near, known[near], context) if near else ""


def _did_you_mean(name: str, option: click.Option, context: click.Context) -> str:
    value = "" if option.is_flag else f" {option.make_metavar(context)}"
    return f"Did you mean {name}{value}?"


def _choice_meant(said: str) -> str:
    """The nearest of the choices that click names when a value is none of them."""
    before, told, after = said.partition("' is not one of '")
    if not told:
        return ""
    near = nearest(before.rpartition("'")[2], after.split("'")[::2])
    return f"Did you mean {near}?" if near else ""


def _output_meant(command: click.Command, arguments: Sequence[str]) -> str:
    """The same call with an output: what was given last, if it can be meant as that."""
    if not _has(command, "output"):
        return ""
    given = _positional(command, arguments)
    if given is None or _option(command, arguments, "output") is not None:
        return ""
    call = ["loratool", *arguments]
    required = sum(isinstance(p, click.Argument) and p.required for p in command.params)
    if len(given) <= required or not _can_be_made(given[-1]):
        return f"Say where to write: {shlex.join([*call, '-o', 'OUT'])}"
    last = len(call) - 1 - call[::-1].index(given[-1])
    meant = [*call[:last], *call[last + 1 :], "-o", given[-1]]
    return f"The output is given by -o. If {given[-1]} is meant as that: {shlex.join(meant)}"


def _with_choice(error: SeveralMeantError, arguments: Sequence[str]) -> str:
    """The same call with one of the paths that could be meant; "" where it is not found in it."""
    for index, word in enumerate(arguments):
        if index and word and Path(word) == Path(error.given):
            call = ["loratool", *arguments[:index], error.choice, *arguments[index + 1 :]]
            return f"{error.lead} {shlex.join(call)}"
    return ""


def _model_meant(error: BaseError, command: click.Command, arguments: Sequence[str]) -> str:
    """What to give where a model is wanted and an adapter was given."""
    given = _positional(command, arguments) or []
    base = _option(command, arguments, "base")
    named = Path(error.message.removesuffix(f": {NO_MODEL}"))
    if base is not None and Path(base) == named:
        return f"--base takes the model, and {base} is an adapter."
    usage = _ended(_usage(click.Context(command, info_name=f"loratool {command.name}")))
    if not given or Path(given[0]) != named or not _has(command, "adapters"):
        return f"Give models: {usage}" if not _has(command, "adapters") else ""
    model = next((path for path in given[1:] if not _is_adapter(path)), None)
    if model is None:
        return f"The model comes first: {usage}"
    call = ["loratool", *arguments]
    first, second = call.index(given[0], 2), len(call) - 1 - call[::-1].index(model)
    call[first], call[second] = call[second], call[first]
    return f"The model comes first. If {model} is meant as that: {shlex.join(call)}"


def _is_adapter(path: str) -> bool:
    return os.path.isfile(path) or os.path.exists(os.path.join(path, ADAPTER_CONFIG))


def _option(command: click.Command, arguments: Sequence[str], name: str) -> str | None:
    """The value of an option in a call; None without one, and where that cannot be told."""
    context = _read(command, arguments)
    value = context.params.get(name) if context is not None else None
    options = {p.name for p in command.params if isinstance(p, click.Option)}
    return value if isinstance(value, str) and name in options else None


def _read(command: click.Command, arguments: Sequence[str]) -> click.Context | None:
    """A call as it is understood, whatever is missing or too much; None where it is not."""
    try:
        return command.make_context(command.name, [*arguments[1:]], resilient_parsing=True)
    except click.ClickException:
        return None


def _positional(command: click.Command, arguments: Sequence[str]) -> list[str] | None:
    """What stands in a call without an option before it; None where that cannot be told."""
    context = _read(command, arguments)
    if context is None:
        return None
    found: list[str] = []
    for param in command.params:
        if isinstance(param, click.Argument):
            value = context.params.get(param.name or "")
            found += [value] if isinstance(value, str) else value or ()
    return [*found, *context.args]


def _can_be_made(path: str) -> bool:
    return not os.path.lexists(path) or is_empty_folder(Path(path))


def _weights_meant(command: click.Command, arguments: Sequence[str]) -> str:
    """How to give several weights, where they were given as one list, or after one option."""
    if not _has(command, "weights"):
        return ""
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option != "--weight":
            continue
        given, *others = [*([value] if equals else []), *arguments[i + 1 :]] or [""]
        numbers = given.split(",") if _LISTED.fullmatch(given) else [given]
        for other in others:
            if not re.fullmatch(_NUMBER, other) or os.path.lexists(other):
                break
            numbers.append(other)
        if len(numbers) > 1:
            repeated = " ".join(f"--weight {number.strip()}" for number in numbers)
            return f"Give --weight once per adapter, in their order: {repeated}."
    return ""
