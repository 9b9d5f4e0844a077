"""Runs of the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from helpers import forked


@dataclass(frozen=True)
class Result:
    """What a run of the command line said, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str


def run_cli(*arguments: object, cwd: Path | None = None, **settings: str) -> Result:
    """Run a command as a user would, with these environment variables more.

    Whatever locale the tests run in, it writes UTF-8.
    """
    env = {"PYTHONIOENCODING": "utf-8", **os.environ, **settings}
    return Result(*forked.run(list(map(str, arguments)), env, cwd or Path.cwd()))
