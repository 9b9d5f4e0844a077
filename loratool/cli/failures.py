"""What is said of a failure that no part of loratool put into words; never a traceback."""

from __future__ import annotations

import errno
import os
import traceback

from loratool.cli.process import say
from loratool.errors import LoraToolError
from loratool.text import escaped

#: Set it, and errors come with the traceback that a report of a bug wants.
_DEBUG = "LORATOOL_DEBUG"

_HINTS = {
    "out-of-memory": "Close other programs, or give the command more memory. Fewer --threads take "
    "less.",
    "too-deep": f"Look at its JSON files; {_DEBUG}=1 shows where it was read.",
    "system": "Check the disk, the path and its permissions.",
    "unexpected": "This is a bug in loratool. Please report it, with the traceback that "
    f"{_DEBUG}=1 shows.",
}


class Unexpected(LoraToolError):
    """A failure that nobody foresaw, told by its kind: something of the machine, or a bug."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, _HINTS[code])
        self.code = code


def unexpected(error: BaseException, command: str) -> Unexpected:
    """The error in words for an exception that `command` let through."""
    if _is_out_of_memory(error):
        return Unexpected("out-of-memory", f"{command}: out of memory.")
    if isinstance(error, RecursionError):
        return Unexpected("too-deep", f"{command}: a file is nested too deeply to be read.")
    if isinstance(error, OSError) and error.strerror:
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        return Unexpected("system", f"{command}: {where}{error.strerror}.")
    first = str(error).strip().partition("\n")[0].rstrip(".")
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return Unexpected("unexpected", f"{command} failed: {said}.")


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory gave out; torch says so in words only, each allocator in its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "can't start new thread",
             "failed to map segment", "bad_alloc")  # fmt: skip
    if isinstance(error, SystemError):  # some extensions lose their MemoryError
        return " an exception" in str(error) or "without exception" in str(error)
    told = isinstance(error, RuntimeError | ImportError)
    return told and any(part in str(error) for part in words)


def show_traceback(error: BaseException) -> None:
    """Print where an error comes from, for those who asked for it."""
    if os.environ.get(_DEBUG):
        say(escaped("".join(traceback.format_exception(error)), keep="\n"))
