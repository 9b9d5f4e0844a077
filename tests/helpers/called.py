"""Functions that tests have computed in other processes, which import them from here."""

from __future__ import annotations

import os
import signal


def place_of(number: int) -> tuple[int, int]:
    """The number, and the process in which this was computed."""
    return number, os.getpid()


def refused(number: int) -> int:
    raise ValueError(f"number {number} is refused")


def killed_elsewhere(number: int, here: int) -> int:
    """The number; any other process than `here` does not live to say it."""
    if os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def loud(number: int) -> int:
    """The number, and noise on stdout."""
    print("printed")
    os.write(1, b"written")
    return number
