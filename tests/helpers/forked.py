"""Processes that share their slow imports.

`run` and `run_snippet` give what a subprocess would: a process of its own, with its own
environment, directory and streams. It is forked from a server that has imported torch, NumPy and
all of loratool, which takes two seconds; huggingface_hub is not among them, because it reads the
environment when imported.

A process whose environment has `HURRY` waits that many times less between two tries.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: What loratool and huggingface_hub import; some go by one of several names.
_SLOW = (
    "numpy", "torch", "rich.console", "rich.progress", "rich.table", "click", "yaml", "tqdm",
    "fsspec", "httpx2", "httpx", "httpcore2", "httpcore", "anyio.to_thread", "h11", "filelock",
    "truststore", "tqdm.auto", "packaging.version",
)  # fmt: skip

#: Servers by the library that is loaded into them before all others, "" for none.
_servers: dict[str, subprocess.Popen[str]] = {}


class Ended(NamedTuple):
    """Exit code, stdout and stderr of a process."""

    code: int
    out: str
    err: str


def run(arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float = 120) -> Ended:
    """`loratool ARGUMENTS`."""
    return _ask({"arguments": list(arguments)}, env, cwd, timeout)


def run_snippet(
    code: str, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float = 120,
    preload: str = "",
) -> Ended:  # fmt: skip
    """`python -c CODE ARGUMENTS`, with a library loaded before all others (LD_PRELOAD)."""
    request = {"arguments": list(arguments), "snippet": code}
    return _ask(request, env, cwd, timeout, preload)


def _ask(
    request: dict[str, Any], env: Mapping[str, str], cwd: Path, timeout: float, preload: str = ""
) -> Ended:
    server = _servers.get(preload)
    if server is None or server.poll() is not None:
        server = _servers[preload] = _start(preload)
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        request |= {"env": dict(env), "cwd": str(cwd), "out": str(out), "err": str(err)}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            server.kill()
            raise TimeoutError(f"{request['arguments']} took more than {timeout} s")
        code = int(server.stdout.readline())
        return Ended(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def _start(preload: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "LD_PRELOAD": preload},
    )  # fmt: skip
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()


def serve() -> None:
    """Fork a process for every request that comes on stdin; answer with its exit code."""
    # This file's folder has modules whose names others may mean.
    sys.path.remove(str(Path(__file__).parent))
    for name in _SLOW:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import loratool

    for module in pkgutil.walk_packages(loratool.__path__, "loratool."):
        # The console looks at its terminal when imported.
        if module.name != "loratool.__main__" and ".rendering" not in module.name:
            importlib.import_module(module.name)
    assert "loratool.rendering.terminal" not in sys.modules
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
        if hurry := os.environ.pop("HURRY", ""):
            sleep = time.sleep
            time.sleep = lambda seconds: sleep(seconds / float(hurry))
        if "snippet" in request:
            sys.argv = ["-c", *request["arguments"]]
            exec(request["snippet"], {"__name__": "__main__"})
            code = 0
        else:
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
