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
    """A dtype by name, with a suggestion for a misspelt one."""

    name = "dtype"
    choices = ("float16", "bfloat16", "float32", "base")

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


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="No progress and no warnings on stderr."
)
