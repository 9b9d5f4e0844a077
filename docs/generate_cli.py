"""Write docs/cli.md from the commands' own help: `python docs/generate_cli.py`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.main import cli
from loratool.cli.options import CONTEXT


def cli_reference() -> str:
    """The whole reference as Markdown; a test compares it with docs/cli.md."""
    parts = [
        "# The command line\n",
        "Made by `docs/generate_cli.py` from `--help`; do not edit by hand.\n",
        _section("loratool", cli, None),
    ]
    context = click.Context(cli, info_name="loratool")
    parts += [
        _section(f"loratool {name}", command, context) for name, command in cli.commands.items()
    ]
    parts.append(
        "## Exit codes\n\n"
        "| code | meaning |\n|---|---|\n"
        "| 0 | done; `verify`: yes |\n"
        "| 1 | failed: the error says what, where and what to do; `verify`: undecided |\n"
        "| 2 | wrong usage |\n"
        "| 3 | the check said no: `verify`, `merge --verify`, `compare --equal`, `lint --for` |\n"
        "| 4 | the Hub wants a login, or another one: `hf auth login` |\n"
        "| 130 | interrupted; finished files may wait for the same command |\n\n"
        "An error is told in words, as JSON with `--json`, and never as a traceback.\n"
        "`LORATOOL_DEBUG=1` shows the traceback too, which a report of a bug wants. Names from\n"
        "files are shown with their control characters escaped (`\\x1b`), and very long ones\n"
        "without their middle; `--json` has them exactly.\n"
    )
    return "\n".join(parts)


def _section(title: str, command: click.Command, parent: click.Context | None) -> str:
    context = click.Context(
        command, info_name=title.split()[-1], parent=parent, max_content_width=90,
        terminal_width=90, help_option_names=CONTEXT["help_option_names"],
    )  # fmt: skip
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    target = Path(__file__).with_name("cli.md")
    target.write_text(cli_reference(), encoding="utf-8")
