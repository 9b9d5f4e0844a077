"""Calls that are computed in Python processes of their own: threads do not share Python's work.

A process is a new interpreter that imports what it is called for and nothing of the script that
asks, so that scripts need no `if __name__ == "__main__"`. Calls and results go through its pipes.
"""

from __future__ import annotations

import os
import pickle
import queue
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from loratool.streams.threads import R, cores

_SCRIPT = """
import pickle, sys
sys.path[:], marker = pickle.load(sys.stdin.buffer)
from loratool.streams.processes import serve
serve(marker)
"""

#: Programs that are Python by themselves. In an application that embeds it, `sys.executable` may be
#: that application, which would be started again.
_PYTHON = re.compile(r"(python|pypy)[\w.-]*", re.IGNORECASE)

#: Lines that a process may print before it answers, as what sites have run at every start does.
_NOISE = 1_000

#: Seconds that a process has to end by itself when nothing is asked any more.
_PATIENCE = 5


class Processes:
    """Processes for the cores, 8 at most and `most` if that is said, to be called from as many
    threads (`count`). Use as a context manager."""

    def __init__(self, most: int | None = None) -> None:
        self.count = min(most or 8, 8, cores())
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._is_over = False

    def __enter__(self) -> Processes:
        for _ in range(self.count):
            process = _started()
            self._all += [process] if process is not None else []
            self._free.put(process)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        for process in self._all:
            process.tell_end(at_once=kind is not None)
        for process in self._all:
            process.wait()

    def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """`function(*arguments)`, of a function that has a name in its module.

        What fails in a process, or with it, is computed again here: so errors are raised where
        somebody hears them, and a process that is killed takes nothing with it.
        """
        process = self._free.get()
        try:
            if process is not None:
                try:
                    is_done, result = process.ask(function, arguments)
                except ProcessGone:
                    process = None
                else:
                    if is_done:
                        answer: R = result
                        return answer
        finally:
            self._free.put(process)
        if self._is_over:
            raise RuntimeError("nobody waits for this any more")
        return function(*arguments)


class ProcessGone(Exception):
    """A process ended, or is none that answers."""


class _Process:
    """An interpreter that runs `serve`."""

    def __init__(self) -> None:
        self._marker = os.urandom(16).hex().encode()
        self._has_begun = False
        # Isolated: nothing of the folder that somebody lists is imported, were it called pickle.py.
        utf8 = f"utf8={sys.flags.utf8_mode}"  # names of files are to be the same
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-X", utf8, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for who started it, whose end is the end of stdin
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._calls, self._answers = self._popen.stdin, self._popen.stdout
        with suppress(ProcessGone):  # the first call will tell
            self._send((sys.path, self._marker))

    def ask(self, *call: Any) -> tuple[bool, Any]:
        """Whether it could compute a call, and the result. Raises ProcessGone."""
        self._send(call)
        try:
            if not self._has_begun:
                self._skip_noise()
            is_done, result = pickle.load(self._answers)
        except Exception as error:  # the beginning of an answer may be anything to pickle
            raise ProcessGone from error
        return is_done, result

    def _skip_noise(self) -> None:
        """Read what was printed before the first answer, up to the marker."""
        for _ in range(_NOISE):
            line = self._answers.readline(1 << 16)
            if line.rstrip() == self._marker:
                self._has_begun = True
                return
            if not line:
                break
        raise EOFError

    def tell_end(self, at_once: bool) -> None:
        if at_once:
            self._popen.kill()
        with suppress(OSError):
            self._calls.close()

    def wait(self) -> None:
        try:
            self._popen.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._answers.close()

    def _send(self, value: Any) -> None:
        data = pickle.dumps(value)
        try:
            self._calls.write(data)
            self._calls.flush()
        except OSError as error:
            raise ProcessGone from error


def _started() -> _Process | None:
    """A process; None where none can be had: of an application that is no Python by itself, or
    from a system that gives no more."""
    name = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or not _PYTHON.fullmatch(name):
        return None
    with suppress(OSError):
        return _Process()
    return None


def serve(marker: bytes) -> None:
    """Answer the calls that come through stdin until it ends, behind a line with the marker."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints from now on is no answer
    answers.write(b"\n" + marker + b"\n")
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception:  # whoever asked will see it
            answer = False, None
        answers.write(pickle.dumps(answer))
        answers.flush()
