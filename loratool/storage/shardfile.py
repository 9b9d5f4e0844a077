"""One safetensors file written by position, from any thread, in any order."""

from __future__ import annotations

import os
from pathlib import Path

from loratool.storage.system import flush_data, open_new, write_at


class ShardWriter:
    """One safetensors file, written by position from any thread, in any order.

    The header is known beforehand, so every byte has its place.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self.data_start = len(header)
        self._fd = open_new(path)
        try:
            self.write(-self.data_start, memoryview(header))
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` bytes into the tensor data."""
        write_at(self._fd, data, self.data_start + offset)

    def flush(self) -> None:
        """Flush what is written so far, beside the writing of the rest."""
        flush_data(self._fd)

    def flush_and_close(self) -> None:
        """Flush everything; called from a thread of its own, beside the writing of the next."""
        try:
            os.fsync(self._fd)
        finally:
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
