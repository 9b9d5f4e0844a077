"""Python processes of their own, which can be stopped in the middle of their work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: A suite that runs in the background has Ctrl-C ignored, which children inherit.
_HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def start_python(
    code: str, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `python -c CODE ARGUMENTS`; what it says comes through pipes, and Ctrl-C reaches it."""
    return subprocess.Popen(
        [sys.executable, "-c", _HEARING + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds while `process` is alive."""
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


#: Runs one merge; prints the error as JSON. PRELUDE runs first, with `options` to change.
_MERGE = """
import json, os, sys, time
import loratool, loratool.merging.executor
base, adapter, output, options, prelude = json.loads(sys.argv[1])
exec(prelude)
try:
    loratool.merge(base, adapter, output, **options)
except loratool.LoraToolError as error:
    print(json.dumps({"kind": type(error).__name__, **error.to_dict()}), flush=True)
    sys.exit(error.exit_code)
"""


def start_merge(
    base: Path,
    adapter: Path,
    output: Path,
    prelude: str = "",
    env: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a merge in a process of its own."""
    arguments = json.dumps([str(base), str(adapter), str(output), options, prelude])
    return start_python(_MERGE, arguments, env=env)
