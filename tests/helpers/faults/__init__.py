"""Runs of the command line in which one system call fails, or the process is killed beside one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.forked import Ended, run_snippet

_SOURCE = Path(__file__).with_name("faults.c")

#: Kinds of calls, and the errors that they are given: those that happen in life.
ERRORS = {
    "open": errno.EMFILE,
    "mkdir": errno.ENOSPC,
    "rename": errno.EIO,
    "unlink": errno.EACCES,
    "rmdir": errno.EBUSY,
    "fsync": errno.EIO,
    "write": errno.ENOSPC,
    "read": errno.EIO,
    "flock": errno.ENOLCK,
    "chmod": errno.EPERM,
    "stat": errno.EIO,
    "list": errno.EACCES,
}

_RUN = """
import ctypes, json, os, sys
library, kind, number, error, below, counted, *arguments = sys.argv[1:]
faults = ctypes.CDLL(library)
leave = os._exit
def end(code):
    counts = {kind: faults.faults_count(kind.encode()) for kind in json.loads(os.environ["KINDS"])}
    faults.faults_arm(b"", 0, 0, b"")
    if counted:
        open(counted, "w").write(json.dumps(counts))
    leave(code)
os._exit = end
from loratool.cli.main import main
faults.faults_arm(kind.encode(), int(number), int(error), below.encode())
main(arguments)
"""


def build(folder: Path) -> Path:
    """The library, compiled into `folder`; skips where it cannot be.

    Only Linux has LD_PRELOAD and /proc/self/fd, by which it knows the files, and a compiler is no
    dependency of the project. What it tests is the order of calls in `storage/placing`, which is
    the same everywhere; the signals beside each of them, in the same test module, need no compiler.
    CI is Linux with one: there a missing compiler is a failure.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        assert "CI" not in os.environ, "CI must have a C compiler"
        pytest.skip("making system calls fail needs Linux's LD_PRELOAD and a C compiler")
    made = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return made


def run_failing(
    library: Path, arguments: list[str], below: Path, kind: str, number: int, error: int = 0
) -> Ended:
    """`loratool ARGUMENTS`, whose `number`-th call of this kind below a folder fails."""
    return _run(library, arguments, below, kind, number, error or ERRORS[kind], "")


def count_calls(library: Path, arguments: list[str], below: Path) -> tuple[Ended, dict[str, int]]:
    """A run in which no call fails, and how many calls of each kind it made below a folder."""
    counts = below.parent / f"{below.name}.counts.json"
    ended = _run(library, arguments, below, "none", 0, 0, str(counts))
    return ended, json.loads(counts.read_text())


def _run(
    library: Path, arguments: list[str], below: Path, kind: str, number: int, error: int,
    counts: str,
) -> Ended:  # fmt: skip
    told = [str(library), kind, str(number), str(error), str(below), counts, *arguments]
    env = {**os.environ, "KINDS": json.dumps(list(ERRORS))}
    return run_snippet(_RUN, told, env, below.parent, preload=str(library))


#: Sends a signal to the process itself beside one call of the end of an output.
_SIGNALLED = """
import os, sys
import loratool.storage.placing as placing
import loratool.storage.presence as presence
import loratool.storage.workfolder as workfolder
name, number, when, signal, steps, *arguments = sys.argv[1:]
if steps == "two":
    placing.exchange = lambda one, other: False
owners = {
    "lock_folder": presence, "replace_json": presence, "sync": placing, "exchange": placing,
    "remove": placing, "flush_place": workfolder,
}
owner = owners.get(name, os)
name = name.removeprefix("os.")
real, calls = getattr(owner, name), []
def call(*given, **named):
    if given and ".loratool-" not in str(given[0]) and "parent" not in str(given[0]):
        return real(*given, **named)
    calls.append(name)
    hit = len(calls) == int(number)
    if hit and when == "before":
        os.kill(os.getpid(), int(signal))
    found = real(*given, **named)
    if hit and when == "after":
        os.kill(os.getpid(), int(signal))
    return found
setattr(owner, name, call)
from loratool.cli.main import main
main(arguments)
"""

#: The calls by which an output gets into its place, in their order: names, and which of several.
MOMENTS = [
    ("lock_folder", 1), ("replace_json", 1), ("os.replace", 1), ("os.replace", 2),
    ("os.replace", 3), ("os.rename", 1), ("sync", 1), ("sync", 3), ("exchange", 1),
    ("flush_place", 1), ("remove", 1),
]  # fmt: skip
#: Those of a system that cannot exchange two folders.
TWO_STEPS = [("os.rename", 2), ("os.rename", 3), ("flush_place", 1), ("remove", 1)]


def run_signalled(
    arguments: list[str], cwd: Path, name: str, number: int, when: str, signal: int, steps: str
) -> Ended:
    """`loratool ARGUMENTS`, with a signal before or after one call by which an output is made."""
    told = [name, str(number), when, str(signal), steps, *arguments]
    return run_snippet(_SIGNALLED, told, os.environ, cwd)
