"""Failures that nobody put into words, streams that are closed, memory that gives out."""

from __future__ import annotations

import compileall
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import forked
from helpers.places import FIXTURES, ROOT

RAISING = """
import sys
import loratool.verbs.inspecting as verb
import numpy, torch
class Panic(BaseException): pass
def fail(*_, **__):
    raise {exception}
verb.inspect = fail
from loratool.cli.main import main
main(sys.argv[1:])
"""


def failing(exception: str, *arguments: str, **env: str) -> forked.Ended:
    return forked.run_snippet(
        RAISING.replace("{exception}", exception),
        ["inspect", "x", *arguments], {**os.environ, **env}, Path.cwd(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("exception", "code", "words"),
    [
        ("MemoryError()", "out-of-memory", "inspect: out of memory."),
        ("numpy.linalg.LinAlgError('SVD\\x1b[31m\\nmore')", "unexpected",
         r"inspect failed: LinAlgError: SVD\x1b[31m."),
        ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried')", "out-of-memory",
         "out of memory"),
        ("torch.OutOfMemoryError('GPU')", "out-of-memory", "out of memory"),
        ("OSError(12, 'Cannot allocate memory')", "out-of-memory", "out of memory"),
        ("ImportError('x.so: failed to map segment')", "out-of-memory", "out of memory"),
        ("RuntimeError('std::bad_alloc')", "out-of-memory", "out of memory"),
        ("SystemError('error return without exception set')", "out-of-memory", "out of memory"),
        ("BrokenPipeError(32, 'Broken pipe')", "system", "Broken pipe"),
        ("RecursionError()", "too-deep", "nested too deeply"),
        ("OSError(5, 'Input/output error', 'a\\x1bb')", "system",
         r"a\x1bb: Input/output error."),
        ("KeyError('x' * 10**6)", "unexpected", "KeyError: 'xxx"),
        ("Panic('in Rust')", "unexpected", "Panic: in Rust."),
    ],
)  # fmt: skip
def test_every_failure_is_one_error(exception: str, code: str, words: str) -> None:
    """Whatever is raised is an error in words with exit code 1, as JSON too; no traceback."""
    done = failing(exception)
    assert (done.code, done.out) == (1, "")
    first, second = done.err.splitlines()
    assert first.startswith("error: inspect")
    assert words in first
    assert second.startswith("hint: ")
    assert len(first) < 500
    as_json = failing(exception, "--json")
    assert as_json.code == 1
    assert json.loads(as_json.err)["error"] == code


def test_the_traceback_is_there_on_request() -> None:
    """LORATOOL_DEBUG=1 shows where an error comes from, printable, before the error."""
    done = failing("KeyError('a\\x1bb')", LORATOOL_DEBUG="1")
    assert "Traceback" in done.err
    assert "in fail" in done.err
    assert "\x1b" not in done.err
    assert done.err.splitlines()[-2].startswith("error: inspect failed: KeyError")


@pytest.mark.process
def test_memory_that_gives_out_is_said(tmp_path: Path) -> None:
    """Under a limit of the system, a large header ends in one error."""
    header = json.dumps({f"{i}.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets":
                         [4 * i, 4 * i + 4]} for i in range(40_000)}).encode()  # fmt: skip
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * 40_000))
    limit = 110 * 2**20
    # To compile a module takes memory too, and Python may call its lack a SyntaxError.
    compileall.compile_dir(ROOT / "loratool", quiet=2)
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", str(path)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: inspect: out of memory.")
    assert "Traceback" not in done.stderr


#: Closes streams as a shell does before it starts a program.
CLOSING = """
import os, sys
closed, full, *sys.argv[1:] = sys.argv[1:]
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if str(number) in closed:
        os.close(number)
        setattr(sys, name, None)
    if str(number) in full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
from loratool.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("closed", "full", "right", "heard"),
    [("0", "", 0, True), ("1", "", 1, True), ("2", "", 0, False), ("12", "", 1, False),
     ("012", "", 1, False), ("", "1", 1, True), ("", "2", 0, False), ("", "12", 1, False)],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_closed_streams(closed: str, full: str, right: int, heard: bool, more: list[str]) -> None:
    """An answer that cannot be printed is an error, where stdout is closed or full; a closed stderr
    is none, and no stream makes a traceback."""
    for path, code in ((FIXTURES / "adapter", right), (FIXTURES / "base", 1)):
        arguments = [closed, full, "inspect", str(path), *more]
        done = forked.run_snippet(CLOSING, arguments, dict(os.environ), Path.cwd())
        assert done.code == code
        assert "Traceback" not in done.err
        assert "Exception" not in done.err
        assert bool(done.err) == (heard and code > 0)
        if right and heard and path.name == "adapter":
            assert "could not be printed" in done.err


@pytest.mark.process
def test_an_output_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints on a stream that the shell closed is not written into the output."""
    code = (
        "import os, sys\n"
        "from loratool.cli.process import prepare\n"
        "prepare()\n"
        "print(open(sys.argv[1], 'w').fileno(), file=open(sys.argv[2], 'w'))"
    )
    command = f'{sys.executable} -c "$0" {tmp_path / "a"} {tmp_path / "b"} <&- >&- 2>&-'
    subprocess.run(["bash", "-c", command, code], check=True)
    assert int((tmp_path / "b").read_text()) > 2


@pytest.mark.process
@pytest.mark.parametrize(("arguments", "code"), [("inspect fixtures/base", 1), ("--help", 0)])
def test_a_reader_that_goes_away_is_no_error(arguments: str, code: int) -> None:
    """`loratool … 2>&1 | true` ends with the code that it has anyway, and without a word."""
    line = f"{sys.executable} -m loratool {arguments} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, "")


def _importing(module: str) -> subprocess.Popen[str]:
    """loratool, held while it imports `module`."""
    code = (
        "import signal, sys, os, importlib.abc\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            print('importing', flush=True); import time; time.sleep(30)\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"sys.argv = ['loratool', 'inspect', {str(FIXTURES / 'adapter')!r}]\n"
        "from loratool.__main__ import start; start()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.process
@pytest.mark.parametrize("module", ["click", "loratool.cli.push", "numpy", "rich.console"])
def test_an_early_interrupt_is_heard(module: str) -> None:
    """Ctrl-C during the imports, of the command line or of a command, is no traceback."""
    child = _importing(module)
    assert child.stdout is not None
    assert child.stdout.readline() == "importing\n"
    before = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert time.monotonic() - before < 10
    assert child.returncode == 130
    assert errors.strip().startswith("interrupted; ")
    assert "Traceback" not in errors


def test_an_interrupt_that_comes_out_as_something_else_is_one() -> None:
    """A KeyboardInterrupt that a library made another exception of is answered as what it was."""
    code = RAISING.replace(
        "    raise {exception}",
        "    import signal\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt: raise ValueError",
    )
    done = forked.run_snippet(code, ["inspect", "x"], dict(os.environ), Path.cwd())
    assert done.code == 130
    assert done.err.startswith("interrupted; ")
