"""Runs tests as on a system without what only POSIX has: `python tests/helpers/portable.py TESTS`.

The names are taken away before loratool is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

NAMES = ("preadv", "pread", "pwrite", "fdatasync", "O_CLOEXEC", "O_NONBLOCK", "sched_getaffinity")


def _named(name: str | None, *rest: Any, **settings: Any) -> Any:
    """A library that has a name; that of the system has none on Windows, which says so."""
    if name is None:
        raise TypeError("no library is called None")
    return _CDLL(name, *rest, **settings)


for _name in NAMES:
    if hasattr(os, _name):
        delattr(os, _name)
sys.modules["fcntl"] = None  # type: ignore[assignment]
_CDLL = ctypes.CDLL
ctypes.CDLL = _named  # type: ignore[assignment,misc]


if __name__ == "__main__":
    # This file's folder has modules whose names others may mean.
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    import pytest

    assert "loratool" not in sys.modules
    sys.exit(pytest.main(sys.argv[1:]))
