"""File permissions that count for root, too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def permissions_that_count() -> Iterator[None]:
    """Take the right away from root, for a while, to pass over file permissions."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    who = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread and those it starts
    held, lowered = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc.capget(who, held)
    libc.capget(who, lowered)
    lowered[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective set
    if libc.capset(who, lowered):
        # A container may run as root and forbid capset: then root reads every file, and a file that
        # may not be read cannot be made. Elsewhere, and always in CI, it can: there this fails.
        assert "CI" not in os.environ
        pytest.skip("running as root, and its rights cannot be lowered")
    try:
        yield
    finally:
        libc.capset(who, held)
