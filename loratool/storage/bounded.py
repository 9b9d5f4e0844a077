"""Reading what a stranger wrote: no length is believed before it is held against what is there.

A file announces how long its parts are. Whoever reads one part by part, be it a pickle, a zip
archive or another container, does so through a `Cursor`, which compares each announced length with
the bytes that are left and only then reads, so that eight bytes cannot ask for a terabyte.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from loratool.errors import FileError
from loratool.storage.system import open_to_read
from loratool.words import counted

#: Longest description of tensors that is read: a safetensors header, a pickle, an index, a zip
#: directory. The longest that a model of today leads to is that of an adapter with factors on each
#: expert of a Kimi K2 (60 layers, 384 experts, 3 matrices, 2 factors: 138,240 tensors), a header
#: of 21 MB; this is four times that. The reference implementation of safetensors ends at 100 MB.
LONGEST_LIST = 84_000_000

#: Axes that a tensor may have, for NumPy and for torch.
MOST_AXES = 64

#: Characters of the longest name; those of real tensors have less than 200.
LONGEST_NAME = 4096


class Malformed(Exception):
    """What is wrong with the content of a file; whoever knows the file says it in a FileError."""


class Cursor:
    """The bytes of a stream from `start` to `end`, read in order.

    Raises Malformed where less is there than announced.
    """

    def __init__(self, stream: BinaryIO, start: int, end: int) -> None:
        stream.seek(start)
        self._stream = stream
        self._end = end
        #: Bytes that may still be read.
        self.left = end - start

    @property
    def position(self) -> int:
        return self._end - self.left

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self._short(count)
        data = self._stream.read(count)
        if len(data) < count:
            raise Malformed("it ended early while being read")
        self.left -= count
        return data

    def number(self, width: int) -> int:
        """An unsigned number of so many bytes, the lowest first."""
        return int.from_bytes(self.take(width), "little")

    def line(self, longest: int) -> bytes:
        """The bytes before the next line feed, which is read too."""
        data = self._stream.readline(min(longest + 1, self.left))
        if not data.endswith(b"\n"):
            raise Malformed("it has a line without an end")
        self.left -= len(data)
        return data[:-1]

    def skip(self, count: int) -> None:
        if count > self.left:
            raise self._short(count)
        self.left -= count
        self._stream.seek(self.position)

    def _short(self, count: int) -> Malformed:
        if self.left == 0:
            return Malformed("it ends too early")
        announced = counted(count, "byte") if count < 1 << 64 else "more bytes than any file has"
        return Malformed(f"it announces {announced} where {self.left:,} are left")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises FileError for a folder, a pipe or a device of that name."""
    fd = open_to_read(path)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return open(fd, "rb")
    os.close(fd)
    what = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise FileError(f"{path}: {what}, not a file.", "Check the path.")
