"""Every command explains itself."""

from __future__ import annotations

import click
from helpers.cli import run_cli

from loratool.cli.main import cli


def test_a_call_without_a_command_gets_the_help() -> None:
    """`loratool` alone shows what there is."""
    done = run_cli()
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == run_cli("--help").stdout


def test_every_command_has_help_with_an_example() -> None:
    """Each command's help explains itself and shows a call that can be copied."""
    for name, command in cli.commands.items():
        done = run_cli(name, "--help")
        assert done.exit_code == 0
        assert f"loratool {name} " in done.stdout.split("Examples:")[1]
        assert all(p.help for p in command.params if isinstance(p, click.Option))
