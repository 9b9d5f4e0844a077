"""Write an undo file, entry after entry; `file` says what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loratool.merging.undo.residual import compress
from loratool.storage.header import build_header
from loratool.storage.system import open_new, write_at

#: The second is the first with `taken` entries, the third is of a quantised base. In these digests
#: are sha256; in the fourth, which may be of either kind, they are BLAKE3.
VERSIONS = (1, 2, 3, 4)

_LARGEST_OFFSET = 10**15


class UndoWriter:
    """Writes an undo file entry after entry, in the order of `add` and `append`.

    A safetensors file begins with the sizes of its entries, which are known only at the end. So
    room is kept for a header that names all of `entries`, and what is not needed becomes spaces.
    """

    def __init__(self, path: Path, entries: list[str]) -> None:
        widest = [(name, "U8", (_LARGEST_OFFSET + i,)) for i, name in enumerate([*entries, "base"])]
        self._room = len(build_header(widest, {"format": "loratool-undo"}))
        self._entries: dict[str, int] = {}
        self._fd = open_new(path)
        self._end = self._room

    def append(self, entry: str, data: bytes) -> None:
        """Add to the newest entry, or begin a new one."""
        if not data:
            return
        assert entry not in self._entries or entry == next(reversed(self._entries))
        self._entries[entry] = self._entries.get(entry, 0) + len(data)
        write_at(self._fd, memoryview(data), self._end)
        self._end += len(data)

    def finish(self, base: dict[str, Any]) -> int:
        """Write the table of the base and the header, close; returns the size of the file."""
        table = {"version": VERSIONS[-1], **base}
        self.append("base", compress(json.dumps(table).encode()))
        shapes = [(name, "U8", (size,)) for name, size in self._entries.items()]
        header = build_header(shapes, {"format": "loratool-undo"}, self._room)
        write_at(self._fd, memoryview(header), 0)
        self.close()
        return self._end

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
