"""Merges in processes of their own, which can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Runs one merge; prints the error as JSON. PRELUDE runs first, with `options` to change.
_CHILD = """
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
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
