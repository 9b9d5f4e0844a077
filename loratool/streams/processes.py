"""Calls that are computed in Python processes of their own: threads do not share Python's work.

A process is a new interpreter that imports what it is called for and nothing of the script that
asks, so that scripts need no `if __name__ == "__main__"`. Calls and results go through its pipes.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from loratool.streams.threads import R, cores

_SCRIPT = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from loratool.streams.processes import serve
serve()
"""

#: Seconds that a process has to end by itself when nothing is asked any more.
_PATIENCE = 5


class Processes:
    """So many processes, to be called from as many threads. Use as a context manager."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or min(8, cores())
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
                except (OSError, EOFError, pickle.UnpicklingError):
                    process = None  # it is gone
                else:
                    if is_done:
                        answer: R = result
                        return answer
        finally:
            self._free.put(process)
        if self._is_over:
            raise RuntimeError("nobody waits for this any more")
        return function(*arguments)


class _Process:
    """An interpreter that runs `serve`."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for who started it, whose end is the end of stdin
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._calls, self._answers = self._popen.stdin, self._popen.stdout
        with suppress(OSError):  # the first call will tell
            self._send(sys.path)

    def ask(self, *call: Any) -> tuple[bool, Any]:
        """Whether it could compute a call, and the result. Raises OSError, EOFError and
        UnpicklingError where it is gone."""
        self._send(call)
        answer: tuple[bool, Any] = pickle.load(self._answers)
        return answer

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
        self._calls.write(pickle.dumps(value))
        self._calls.flush()


def _started() -> _Process | None:
    """A process; None where none can be had: from an application that is no Python by itself, or
    of a system that gives no more."""
    if getattr(sys, "frozen", False) or not sys.executable:
        return None
    with suppress(OSError):
        return _Process()
    return None


def serve() -> None:
    """Answer the calls that come through stdin until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
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
