"""Runs of the command line that share their slow imports.

`run` gives what a subprocess would: a process of its own, with its own environment, directory and
streams. It is forked from a server that has imported torch, NumPy and the like, which takes two
seconds; huggingface_hub is not among them, because it reads the environment when imported.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SLOW = (
    "numpy", "torch", "rich.console", "rich.progress", "rich.table", "click", "yaml", "tqdm",
    "fsspec", "httpx2", "httpx", "packaging.version",
    "loratool.verbs.merge", "loratool.merging.executor",
    "loratool.publishing.shard_upload", "loratool.verbs.push", "loratool.verbs.inspect",
    "loratool.verbs.compare",
)  # fmt: skip

_server: subprocess.Popen[str] | None = None


def run(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float = 120
) -> tuple[int, str, str]:
    """`loratool ARGUMENTS`: exit code, stdout, stderr."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = _start()
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        request = {
            "arguments": list(arguments), "env": dict(env), "cwd": str(cwd), "out": str(out),
            "err": str(err),
        }  # fmt: skip
        assert _server.stdin is not None
        assert _server.stdout is not None
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        if not select.select([_server.stdout], [], [], timeout)[0]:
            _server.kill()
            raise TimeoutError(f"{arguments} took more than {timeout} s")
        code = int(_server.stdout.readline())
        return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")


def _start() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def serve() -> None:
    """Fork a process for every request that comes on stdin; answer with its exit code."""
    for name in _SLOW:
        try:
            __import__(name)
        except ImportError:  # one of several names
            continue
    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    code = 1
    try:
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(request[name], flags, 0o600), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
        from loratool.cli.main import main

        main(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
