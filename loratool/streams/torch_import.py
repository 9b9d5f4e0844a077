"""The import of torch, beside other work: it takes a second or two of one core.

What needs torch imports it as ever, and waits for the rest if it is under way.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from threading import Thread

_importing: Thread | None = None


def begin_import() -> None:
    """Begin to import torch, in a thread of its own, unless that was done."""
    global _importing
    if "torch" not in sys.modules and _importing is None:
        _importing = Thread(target=_import, name="import torch")
        _importing.start()


def is_imported() -> bool:
    """Whether torch can be used without waiting for it."""
    return "torch" in sys.modules and (_importing is None or not _importing.is_alive())


def _import() -> None:
    with suppress(Exception):  # who needs it tries again, and meets the error
        import torch  # noqa: F401
