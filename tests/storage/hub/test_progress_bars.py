"""Downloads are silent in a pipe and show a bar on a terminal."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers.adapters import Q
from helpers.hub import HubServer
from helpers.hub_runs import downloads, factors, paths, run, sparse
from helpers.places import FIXTURES


def test_a_download_is_silent_in_a_pipe(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """stderr is for warnings: no bar, no word about a missing token, no telemetry."""
    for token in (None, "hf_writer"):
        done = run(hub, home / str(token), "inspect", "org/adapter", token=token)
        assert done.err == ""
        assert done.out


def on_terminal(command: list[str], env: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run a command whose stderr is a terminal of 100 columns: exit code, and what it shows."""
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (30, 100))
    with subprocess.Popen(
        command, env=env, cwd=cwd, stdin=terminal, stdout=subprocess.DEVNULL, stderr=terminal
    ) as child:
        os.close(terminal)
        seen = b""
        try:
            while piece := os.read(shown, 65536):
                seen += piece
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(shown)
    return child.returncode, seen.decode(errors="replace")


@pytest.mark.process
@pytest.mark.parametrize("options", ["", "-q", "--json"])
def test_bars_are_for_terminals_and_not_for_the_quiet(
    hub: HubServer, home: Path, tmp_path: Path, options: str
) -> None:
    """On a terminal a download above 10 MB shows how far it is, unless asked to be quiet."""
    folder = tmp_path / "a"
    sparse(folder / "adapter_model.safetensors", factors([Q], 100_000, 100_000, 16), "F32")
    shutil.copy(FIXTURES / "adapter" / "adapter_config.json", folder)
    hub.add("org/bars", dict(paths(folder)))
    home.mkdir()
    command = [sys.executable, "-m", "loratool", "inspect", "org/bars", *options.split()]
    code, seen = on_terminal(command, {**hub.environment(home), "TERM": "xterm"}, home)
    assert code == 0
    assert downloads(hub) == ["adapter_model.safetensors"]
    assert ("Downloading" in seen) == (options == "")
