"""Which file a name leads to: it may be exchanged or rewritten while a run reads it.

A file is known by its device, its inode, its size and its time of change. Who reads a part of a
file holds these against those that it had when its header was read; so a run ends with an error,
and not with a mixture of two files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from loratool.errors import FileError


class Stamp(NamedTuple):
    """What a file is known by; `changed` is in ns."""

    device: int
    inode: int
    nbytes: int
    changed: int


def stamp_of(file: Path | int) -> Stamp:
    """The stamp of a file, by its path or its descriptor."""
    found = os.stat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def changed_file(path: Path) -> FileError:
    """The error for a file that is not any more what it was at first."""
    return FileError(
        f"{path}: it changed while it was read.",
        "Let what writes there finish; then run the command again. Nothing was written.",
    )
