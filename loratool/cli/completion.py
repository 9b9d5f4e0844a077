"""`loratool completion`: the script that lets a shell complete loratool's commands."""

from __future__ import annotations

import click

#: What a shell has of the program's name: the variable by which its script asks for completions.
VARIABLE = "_LORATOOL_COMPLETE"


@click.command("completion", short_help="Print the script for completion in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that lets a shell complete commands, options, their values and files.

    It is for the shell's start, once:

    \b
      bash  echo 'eval "$(loratool completion bash)"' >> ~/.bashrc
      zsh   echo 'eval "$(loratool completion zsh)"' >> ~/.zshrc
      fish  loratool completion fish > ~/.config/fish/completions/loratool.fish

    zsh needs its own completion to be on before that line: autoload -Uz compinit &&
    compinit. Paths are completed by the shell as for every program; ids on the Hub are
    typed.

    \b
    Examples:
      eval "$(loratool completion bash)"
      loratool completion fish > ~/.config/fish/completions/loratool.fish
    """
    from loratool.rendering.terminal import print_file

    print_file(script_for(shell))


def script_for(shell: str) -> str:
    """The script of a shell: click's own."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    # The base class's: bash is not asked for its version, which click does by starting one.
    kind = found({}, {}, "loratool", VARIABLE)  # type: ignore[arg-type]
    script = kind.source_template % kind.source_vars()
    # Where we have nothing to offer, bash does what it does for any program.
    own = "complete -o nosort"
    return script.replace(f"{own} -F", f"{own} -o bashdefault -o default -F")
