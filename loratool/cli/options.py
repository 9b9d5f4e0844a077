"""What the commands share: their group, parameter types and options."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

from loratool.adapters.weighting import Weight, parse_weight
from loratool.cli.completing import offer_values
from loratool.cli.mistakes import command_meant
from loratool.errors import UsageError, nearest
from loratool.storage.destination import plan_first
from loratool.text import fitting

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 90}


class _Help(click.HelpFormatter):
    """Help in signs that stdout has; click writes UTF-8 where stdout is said to be ASCII."""

    def getvalue(self) -> str:
        return fitting(super().getvalue(), sys.stdout.encoding or "utf-8")


class _Context(click.Context):
    formatter_class = _Help


class Commands(click.Group):
    """A group that suggests the command somebody may have meant, and values to shells."""

    context_class = _Context

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(cmd, name)
        cmd.context_class = _Context
        offer_values(cmd)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        unknown = args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:  # a shell that completes wants no error
            near = command_meant(args[0], self.list_commands(ctx))
            hint = f"Did you mean {near!r}? " if near else ""
            raise UsageError(f"No such command {args[0]!r}.", f"{hint}See loratool --help.")
        return super().resolve_command(ctx, args)


class Dtype(click.ParamType):  # type: ignore[type-arg]
    """A dtype by name, with a suggestion for a misspelt one; "base" only where it has a meaning."""

    name = "dtype"

    def __init__(self, base: bool = True) -> None:
        self.choices = ("float16", "bfloat16", "float32", *(["base"] if base else []))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        aliases = {"fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
                   "fp32": "float32", "f32": "float32"}  # fmt: skip
        name = aliases.get(str(value).lower(), str(value))
        if name not in self.choices:
            # Of other bits there is another dtype: float8 is no misspelt float32.
            bits = _digits(name)
            near = nearest(name, [c for c in self.choices if not bits or _digits(c) == bits])
            self.fail(
                f"{value!r} is not one of {', '.join(self.choices)}."
                + (f" Did you mean {near}?" if near else ""),
                param,
                ctx,
            )
        return name


def _digits(text: str) -> list[str]:
    return sorted(filter(str.isdigit, text))


class ClusterAddress(click.ParamType):  # type: ignore[type-arg]
    """Where a Ray cluster is, so that a path after --ray is not taken for it."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from loratool.streams.cluster import check_address

        try:
            check_address(str(value))
        except UsageError as error:
            self.fail(f"{error.message} {error.hint}", param, ctx)
        return str(value)


class WeightText(click.ParamType):  # type: ignore[type-arg]
    """A factor, or several of them for ranges of layers."""

    name = "weight"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Weight:
        try:
            return parse_weight(str(value))
        except UsageError as error:  # click names the option itself
            said = error.message.removeprefix("--weight ")
            self.fail(f"{said} {error.hint}", param, ctx)


Decorator = Callable[[Any], Any]


def _shared(*names: str, help: str, **settings: Any) -> Callable[..., Decorator]:
    """An option of several commands: `name()`, or `name("help")` where it means more there."""

    def option(text: str = help, **more: Any) -> Decorator:
        return click.option(*names, help=text, **{**settings, **more})

    return option


weight_option = _shared(
    "--weight", "weights", multiple=True, type=WeightText(), metavar="W",
    help="Factor of an adapter, once for each, in their order; may be negative, and another one "
         "for some layers: 1,0.5@layers.0-3. [default: 1.0]",
)  # fmt: skip
model_dtype_option = _shared(
    "--dtype", type=Dtype(), metavar="float16|bfloat16|float32|base",
    help="Dtype of all floating tensors of the output; base keeps each tensor's own.",
)  # fmt: skip
factor_dtype_option = _shared(
    "--dtype", type=Dtype(base=False), metavar="float16|bfloat16|float32",
    help="Dtype of the factors. [default: the inputs' own; float32 where they differ]",
)  # fmt: skip
output_option = _shared("-o", "--output", metavar="OUT", help="Directory to write.")
base_option = _shared("--base", metavar="BASE", help="The model before the merge.")
base_id_option = _shared(
    "--base", metavar="ID", help="Hub id of the base model, where PATH does not tell."
)
allow_unmatched_option = _shared(
    "--allow-unmatched", is_flag=True,
    help="Merge what fits when parts of an adapter do not, and record the rest.",
)  # fmt: skip
components_option = _shared(
    "--components", multiple=True, metavar="NAME",
    help="Only this part of the base, e.g. text_model, where an adapter fits several; repeatable.",
)  # fmt: skip
expert_b_layout_option = _shared(
    "--expert-b-layout", type=click.Choice(["rank-major", "grouped"]),
    help="How lora_B of expert stacks lies where the adapter does not tell: rank-major as PEFT's, "
         "grouped as Unsloth's before unsloth-zoo 2026.9.6. [default: rank-major]",
)  # fmt: skip
initial_option = _shared(
    "--initial", metavar="ADAPTER",
    help="ADAPTER as it was before training, where its initialisation changed the base.",
)  # fmt: skip
replicate_layers_option = _shared(
    "--replicate-layers", is_flag=True,
    help="Copy layers of the base as layer_replication of the adapter says.",
)  # fmt: skip
layer_option = _shared(
    "--layer", "layers", metavar="N[-M][,…]", help="Only modules of these layers."
)
include_option = _shared(
    "--include", multiple=True, metavar="GLOB",
    help="Only modules whose path ends like GLOB, e.g. 'self_attn.*'. Repeatable.",
)  # fmt: skip
exclude_option = _shared(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these modules out; may be repeated."
)


def choice_options() -> Decorator:
    """--include and --exclude, of commands that take parts of adapters."""

    def option(command: Any) -> Any:
        return include_option()(exclude_option()(command))

    return option


rank_option = _shared("--rank", type=int, metavar="K", help="This rank for every module.")
energy_option = _shared(
    "--energy", type=float, metavar="SHARE",
    help="The smallest rank that keeps this share of ‖ΔW‖² in every module.",
)  # fmt: skip
uniform_option = _shared(
    "--uniform", is_flag=True, help="One rank for all modules: what there is without --patterns."
)
patterns_option = _shared(
    "--patterns", is_flag=True,
    help="Each module with the rank that it needs itself (rank_pattern). PEFT and vLLM read that; "
         "llama.cpp and Ollama compute it wrongly, SGLang, LoRAX and TGI refuse it.",
)  # fmt: skip
max_rank_option = _shared(
    "--max-rank", type=int, metavar="K", help="No module gets more than this."
)
seed_option = _shared(
    "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="Seed of the randomised decompositions.",
)  # fmt: skip
spectrum_option = _shared(
    "--spectrum", is_flag=True, help="Show the singular values of every module."
)
shard_size_option = _shared(
    "--max-shard-size", metavar="SIZE",
    help="Write files of at most SIZE, such as 5GB. [default: the base's own files]",
)  # fmt: skip
private_option = _shared("--private", is_flag=True, help="Create the repository private.")
shard_push_option = _shared(
    "--push", metavar="REPO",
    help="Upload to this repository on the Hub, each shard as soon as it is verified.",
)  # fmt: skip
no_keep_option = _shared(
    "--no-keep", is_flag=True,
    help="With --push: remove each shard here once it is there; no OUT then.",
)  # fmt: skip
restart_option = _shared(
    "--restart", is_flag=True,
    help="Make again what an earlier, killed run had finished; it is taken up else.",
)  # fmt: skip


ray_option = _shared(
    "--ray", metavar="[ADDRESS]", type=ClusterAddress(), is_flag=False, flag_value="",
    help="Do it as tasks of the Ray cluster at ADDRESS (auto, host:port); without one on this "
         "machine. Needs loratool[ray].",
)  # fmt: skip


def split_options() -> Decorator:
    """--restart, --worker and --ray, of commands whose outputs are made file by file."""

    def option(command: Any) -> Any:
        for one in reversed((
            restart_option(),
            click.option(
                "--worker", metavar="I/N",
                help="Make the I-th of N shares only, side by side with the other workers; the "
                     "last one completes OUT.",
            ),
            ray_option(),
        )):  # fmt: skip
            command = one(command)
        return command

    return option


def overwrite_option(text: str = "Replace OUT if it is there.") -> Decorator:
    """--overwrite, True, and --overwrite-all, "all"; False without either."""

    def option(command: Any) -> Any:
        @functools.wraps(command)
        def with_the_wider(overwrite: bool, overwrite_all: bool, **others: Any) -> Any:
            return command(overwrite="all" if overwrite_all else overwrite, **others)

        more = "The same, also with files in OUT that are no part of it."
        with_all = click.option("--overwrite-all", is_flag=True, help=more)(with_the_wider)
        return click.option("--overwrite", is_flag=True, help=text)(with_all)

    return option


dry_run_option = _shared("--dry-run", is_flag=True, help="Compute and report, but write nothing.")
full_option = _shared("--full", is_flag=True, help="One line per module; do not fold layers.")
threads_option = _shared(
    "--threads", type=click.IntRange(1), help="Worker threads. [default: the cores, 8 at most]"
)
json_option = _shared("--json", "as_json", is_flag=True, help="Print one JSON document.")
html_option = _shared(
    "--html", metavar="FILE", help="Also write it as a page with charts, for a browser."
)
plot_option = _shared(
    "--plot", metavar="FILE", help="Also draw its charts: FILE.png, FILE.svg or FILE.pdf."
)
pager_option = _shared(
    "--pager", is_flag=True, help="Show the answer through $PAGER, on a terminal."
)
quiet_option = _shared("-q", "--quiet", is_flag=True, help="No progress and no warnings on stderr.")


def answer_options(pages: bool = False) -> Decorator:
    """--json and --quiet, and with `pages`, for answers that are looked at for long, --html, --plot
    and --pager; the command gets them as `forms`.

    A dry run shows its answer, and then what the real run would end with.
    """

    def option(command: Any) -> Any:
        @functools.wraps(command)
        def with_forms(
            as_json: bool,
            quiet: bool,
            html: str | None = None,
            plot: str | None = None,
            pager: bool = False,
            **others: Any,
        ) -> Any:
            from loratool.rendering.answering import Forms
            from loratool.rendering.terminal import paged

            forms = Forms(as_json, quiet, html, plot)
            forms.check()
            with plan_first() if others.get("dry_run") else nullcontext(), paged(pager):
                return command(forms=forms, **others)

        found = json_option()(quiet_option()(with_forms))
        if pages:
            found = html_option()(plot_option()(pager_option()(found)))
        return found

    return option
