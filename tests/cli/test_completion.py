"""What shells complete: commands, options, values, and files by themselves."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from helpers.cli import run_cli
from helpers.places import ROOT

from loratool.adapters.dialects import DIALECTS, TARGETS
from loratool.cli.main import cli
from loratool.linalg.methods import METHODS


def offered(line: str) -> list[str]:
    """What bash is told for the last word of a line, by click's protocol: kind and value."""
    words = line.split(" ")
    asked = {
        "_LORATOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = run_cli(**asked)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("loratool comb", ["combine"]),
        ("loratool merge --quan", ["--quantised"]),
        ("loratool merge b a --dtype ", ["float16", "bfloat16", "float32", "base"]),
        ("loratool merge b a --dtype=b", ["bfloat16", "base"]),
        ("loratool resize a --dtype f", ["float16", "float32"]),
        ("loratool combine a b --method ", list(METHODS)),
        ("loratool combine a b --method ties_", [m for m in METHODS if m.startswith("ties_")]),
        ("loratool convert a --to ", list(TARGETS)),
        ("loratool lint a --for v", ["vllm"]),
        ("loratool list --sort d", ["dialect", "date"]),
        ("loratool inspect a --from m", [d.name for d in DIALECTS if d.name.startswith("m")]),
        ("loratool inspect a --product ", ["BA", "AB", "ABt"]),
        ("loratool merge --quantised ", ["plain", "keep", "requantise"]),
        ("loratool combine --majority-sign-method ", ["total", "frequency"]),
        ("loratool extract --skip n", ["norms"]),
        ("loratool completion ", ["bash", "zsh", "fish"]),
    ],
)  # fmt: skip
def test_commands_options_and_values_are_offered(line: str, words: list[str]) -> None:
    """What has names is completed by them, those that a verb knows too."""
    assert offered(line) == [f"plain,{word}" for word in words]


@pytest.mark.parametrize(
    "line",
    ["loratool inspect ad", "loratool merge ad", "loratool merge base/ ad", "loratool merge -o ad",
     "loratool inspect a --base ad", "loratool merge b a --initial ad", "loratool unmerge m a ad",
     "loratool inspect a --html ad", "loratool push ad", "loratool finish ad"],
)  # fmt: skip
def test_paths_are_left_to_the_shell(line: str) -> None:
    """Where a path can stand the shell completes files in its own way."""
    assert offered(line) == ["file,ad"]


@pytest.mark.parametrize(
    "line", ["loratool nothing x", "loratool merge --nothing x", "loratool 'x"]
)
def test_a_wrong_line_is_no_error_while_it_is_typed(line: str) -> None:
    """Where a line has mistakes the shell is told nothing, or files, and shows no error."""
    assert all(item.startswith("file,") for item in offered(line))


def test_every_argument_completes_something() -> None:
    """No command, a new one neither, has an argument that a shell has nothing for."""
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=name)
        for param in command.params:
            if isinstance(param, click.Argument):
                assert param.shell_complete(context, ""), (name, param.name)


def test_ids_of_the_hub_pass_where_files_complete(tmp_path: Path) -> None:
    """Completion of files refuses nothing: an id goes to the Hub."""
    done = run_cli("inspect", "org/adapter", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert done.exit_code == 1
    assert "org/adapter" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(shell: str) -> None:
    """The script asks loratool, and its help says where it goes."""
    done = run_cli("completion", shell)
    assert done.exit_code == 0
    assert f"_LORATOOL_COMPLETE={shell}_complete" in done.stdout
    assert f"loratool completion {shell}" in run_cli("completion", "--help").stdout


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_its_script(shell: str, tmp_path: Path) -> None:
    """Each shell that is installed parses the script without a complaint."""
    if shutil.which(shell) is None:
        # Nobody needs three shells to work on loratool; .ci/run installs them, so CI never skips.
        assert "CI" not in os.environ, f".ci/run installs {shell}"
        pytest.skip(f"there is no {shell} here")
    script = tmp_path / "script"
    script.write_text(run_cli("completion", shell).stdout)
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class _Bash:
    """An interactive bash at a terminal, which completion is turned on in."""

    def __init__(self, folder: Path) -> None:
        own = folder / "bin"
        own.mkdir()
        program = own / "loratool"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m loratool "$@"\n')
        program.chmod(0o755)
        env = {
            **os.environ, "PATH": f"{own}:{os.environ['PATH']}", "PS1": "ready> ", "TERM": "dumb",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "INPUTRC": "/dev/null", "HISTFILE": "",
        }  # fmt: skip
        self.terminal, there = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"], stdin=there, stdout=there, stderr=there,
            cwd=folder, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(there)
        self.send('eval "$(loratool completion bash)"; echo turned-"on"\n', "turned-on")

    def send(self, keys: str, until: str) -> str:
        """Type keys, and read until a text appears."""
        os.write(self.terminal, keys.encode())
        shown, end = "", time.monotonic() + 60
        while until not in shown:
            assert time.monotonic() < end, shown
            if select.select([self.terminal], [], [], 1)[0]:
                shown += os.read(self.terminal, 4096).decode(errors="replace")
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.mark.process
def test_in_bash_files_and_values_are_completed(tmp_path: Path) -> None:
    """In a real bash a tab completes a folder, a folder with a space in its name, the value of an
    option, a command; and files where loratool has nothing to offer."""
    if shutil.which("bash") is None:
        # Some systems ship without it; .ci/run is itself a bash script, so CI never skips.
        assert "CI" not in os.environ
        pytest.skip("there is no bash here")
    (tmp_path / "adapters of mine").mkdir()
    (tmp_path / "merged-model").mkdir()
    bash = _Bash(tmp_path)
    try:
        for typed, completed in (
            ("loratool inspect adap", r"loratool inspect adapters\ of\ mine/"),
            ("loratool merge merged-model x -o merg", "-o merged-model/"),
            ("loratool merge b a --dtype bf", "--dtype bfloat16 "),
            ("loratool deq", "loratool dequantise "),
            ("loratool resize a --rank merg", "--rank merged-model/"),
        ):
            bash.send(f"{typed}\t", completed)
            bash.send("\x15\n", "ready> ")  # the line is thrown away
    finally:
        bash.close()
