"""How long the Hub is waited for: an answer has its time, and a transfer must go on.

huggingface_hub waits for some answers without end, and a server that sends a byte now and then
keeps every time-out of a connection from passing. So calls run in threads of their own, which are
left behind when their time is over; they do not keep the process from ending.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from loratool.errors import HubError

#: A commit of many files takes the Hub so many times as long as another answer.
COMMIT = 5
#: Bytes of a transfer that must come within the time of two answers.
_LEAST = 1_000


def _seconds() -> float:
    """How long an answer may take."""
    try:
        return max(0.1, float(os.environ.get("LORATOOL_HUB_SECONDS") or 60))
    except ValueError:
        return 60.0


class Unreachable(HubError):
    """No answer from the Hub: no network, or HF_HUB_OFFLINE."""


T = TypeVar("T")
_left: list[str] = []


def is_left_behind() -> bool:
    """Whether a call still runs that nobody waits for: the process must end without it."""
    return bool(_left)


def answered(call: Callable[[], T], what: str, times: int = 1) -> T:
    """The result of `call`. Raises Unreachable if it has none in time; `what` was asked for."""
    limit = times * _seconds()
    work = _Work(call)
    if not work.done.wait(limit):
        raise _given_up(
            what,
            f"The Hub did not answer within {limit:g} s when it was asked for {what}.",
            "Try again later; LORATOOL_HUB_SECONDS=300 waits longer.",
        )
    found: T = work.result()
    return found


def going_on(call: Callable[[], T], what: str, arrived: Callable[[], int] | None = None) -> T:
    """The result of a transfer, of which `arrived` counts the bytes so far.

    A Ctrl-C need not wait for it. Raises Unreachable if it comes to a stop.
    """
    work, limit = _Work(call), 2 * _seconds()
    since, known = time.monotonic(), arrived() if arrived else 0
    while not work.done.wait(min(1.0, limit / 4)):
        now = arrived() if arrived else known + _LEAST
        if abs(now - known) >= _LEAST:
            since, known = time.monotonic(), now
        elif time.monotonic() - since > limit:
            raise _given_up(
                what,
                f"Less than {_LEAST:,} bytes came from the Hub within {limit:g} s of {what}.",
                "Run the command again; what is complete is not downloaded twice.",
            )
    found: T = work.result()
    return found


def _given_up(what: str, message: str, hint: str) -> Unreachable:
    """The error for a call that nobody waits for any more."""
    _left.append(what)
    return Unreachable(message, hint)


class _Work:
    """A call in a thread that nobody has to wait for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self._call = call
        self._found: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            self._error = error
        self.done.set()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._found


class PatientStream:
    """A file of the Hub that is read by ranges, each of which must come in time."""

    def __init__(self, stream: Any, what: str) -> None:
        self._stream, self._what = stream, what

    def read(self, size: int = -1) -> bytes:
        found: bytes = answered(lambda: self._stream.read(size), self._what)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def limit_uploads() -> None:
    """Give requests for which the library names no time one, where a later library lets us."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    change: Any = getattr(huggingface_hub, "set_client_factory", None)
    usual: Any = getattr(_http, "default_client_factory", None)
    current: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if not callable(change) or not callable(usual) or current is not usual:
        return
    change(partial(_limited, usual, COMMIT * _seconds()))


def _limited(usual: Callable[[], Any], seconds: float) -> Any:
    client = usual()
    client.timeout = seconds
    return client
