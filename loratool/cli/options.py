"""What the commands share: their group, parameter types and options."""

from __future__ import annotations

from typing import Any

import click

from loratool.errors import nearest

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 90}


class Commands(click.Group):
    """A group that suggests the command somebody may have meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = nearest(args[0], self.list_commands(ctx))
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near!r}?" if near else ""))
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
            near = nearest(name, self.choices)
            self.fail(
                f"{value!r} is not one of {', '.join(self.choices)}."
                + (f" Did you mean {near}?" if near else ""),
                param,
                ctx,
            )
        return name


weight_option = click.option(
    "--weight", "weights", multiple=True, type=float, metavar="W",
    help="Factor of an adapter, once for each, in their order; may be negative. [default: 1.0]",
)  # fmt: skip
factor_dtype_option = click.option(
    "--dtype", type=Dtype(base=False), metavar="float16|bfloat16|float32",
    help="Dtype of the factors. [default: the inputs' own; float32 where they differ]",
)  # fmt: skip
output_option = click.option(
    "-o", "--output", required=True, metavar="OUT", help="Directory to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Compute and report, but write nothing."
)
full_option = click.option("--full", is_flag=True, help="One line per module; do not fold layers.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Worker threads. [default: the cores]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="No progress and no warnings on stderr."
)
