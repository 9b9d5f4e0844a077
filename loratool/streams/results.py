"""Results that outlive the process that computed them, and are found by all that work together.

Each process appends to a file of its own, so that a folder on a network file system will do, where
nothing is atomic but to make a file. A record ends with a digest over all of it: one that is
half-written, or not here yet from another machine, does not count, and neither does what follows it
in that file. Its owner may still write it anew, so a later look begins there again.

A record is `_MAGIC`, the lengths of its head (4 bytes) and of its data (8), both with the lowest
byte first; the head, a JSON object with `key`, `facts` and the `sizes` of the pieces; the pieces;
and the BLAKE3 digest of what came before (32 bytes).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from loratool.storage.bounded import Cursor, Malformed, open_regular
from loratool.storage.system import flush_data, open_new, open_to_read, read_at, sync, write_at
from loratool.storage.tensors import Bytes

_MAGIC = b"loraRES1"
_LENGTHS = struct.Struct("<8sIQ")
_SUFFIX = ".log"

#: Bytes of the longest head. The singular values of a full decomposition are 25 bytes each, and a
#: matrix has less than a million.
_LONGEST_HEAD = 1 << 25

#: Bytes of a record that are read at a time.
_BLOCK = 1 << 20

#: Logs of other processes that are held open; a system lets a process have 1024 files or more.
_MOST_OPEN = 256


@dataclass(frozen=True)
class Piece:
    """Bytes of a result, which lie in a file until somebody reads some of them."""

    log: ResultLog
    path: Path
    start: int
    nbytes: int

    def read_into(self, target: memoryview, offset: int = 0) -> None:
        """Fill `target`, which is of bytes, from byte `offset` of the piece on."""
        if offset + len(target) > self.nbytes:
            raise ValueError(f"{self.nbytes} bytes end before {offset + len(target)}")
        self.log.read(self.path, target, self.start + offset)


@dataclass(frozen=True)
class Result:
    """What one computation gave: a JSON object, and bytes that are not in memory."""

    facts: dict[str, Any]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Place:
    """Where a record's head lies, and where its data does."""

    path: Path
    head: int
    data: int


class ResultLog:
    """The results in a folder, by key. Use with `with`; any thread may get and put.

    Memory holds the keys alone. The folder is made with the first result if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / (secrets.token_hex(16) + _SUFFIX)
        self._end = 0
        self._places: dict[str, _Place] = {}
        self._looked_at: dict[Path, int] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.refresh()

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read or put afterwards: a thread that is late makes no files anew."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def refresh(self) -> None:
        """Find what other processes have put since."""
        try:
            with os.scandir(self.folder) as entries:
                names = [e.name for e in entries if e.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return
        for name in sorted(names):
            path = self.folder / name
            if name.endswith(_SUFFIX) and path != self._own:
                with suppress(FileNotFoundError):  # the run is over, and somebody tidies up
                    self._look_at(path)

    def get(self, key: str) -> Result | None:
        """The result of this key, if one is there."""
        place = self._places.get(key)
        if place is None:
            return None
        head = bytearray(place.data - place.head)
        self.read(place.path, memoryview(head), place.head)
        _, facts, sizes = _parsed(head)
        return self._result(place, facts, sizes)

    def put(self, key: str, facts: dict[str, Any], pieces: Sequence[Bytes]) -> Result:
        """Append a result. `facts` is what JSON can hold; its floats come back exactly.

        Of two with one key this process finds its own, or else the one it saw first.
        """
        sizes = [piece.nbytes for piece in pieces]
        head = json.dumps({"key": key, "facts": facts, "sizes": sizes}).encode()
        if len(head) > _LONGEST_HEAD:
            raise ValueError(f"{key}: {len(head)} bytes of facts")
        lengths = _LENGTHS.pack(_MAGIC, len(head), sum(sizes))
        parts: list[memoryview] = [memoryview(lengths + head), *(p.data for p in pieces)]
        digest = blake3()
        for part in parts:
            digest.update(part)
        with self._lock:
            self._refuse_closed()
            # After a write that failed this goes over what it left.
            place = _Place(self._own, self._end + _LENGTHS.size, self._end + len(parts[0]))
            end, descriptor = self._end, self._writable()
            for part in (*parts, memoryview(digest.digest())):
                write_at(descriptor, part, end)
                end += len(part)
            self._end = end
            self._places[key] = place
        return self._result(place, facts, sizes)

    def flush(self) -> None:
        """Bring what this process has put to the disk, and to where other machines see it."""
        with self._lock:
            descriptor = self._descriptors.get(self._own)
            if descriptor is not None:
                flush_data(descriptor)
                sync(self.folder)

    def read(self, path: Path, target: memoryview, position: int) -> None:
        """Fill `target` from a log's byte `position` on."""
        with self._lock:
            self._refuse_closed()
            descriptor = self._descriptors.get(path)
            if descriptor is None and len(self._descriptors) < _MOST_OPEN:
                descriptor = self._descriptors[path] = open_to_read(path)
        if descriptor is not None:
            _fill(descriptor, target, position)
            return
        descriptor = open_to_read(path)
        try:
            _fill(descriptor, target, position)
        finally:
            os.close(descriptor)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError(f"{self.folder}: the log is closed")

    def _writable(self) -> int:
        if self._own not in self._descriptors:
            self.folder.mkdir(exist_ok=True)
            self._descriptors[self._own] = open_new(self._own)
        return self._descriptors[self._own]

    def _look_at(self, path: Path) -> None:
        position = self._looked_at.get(path, 0)
        with open_regular(path) as stream:
            cursor = Cursor(stream, position, max(position, os.fstat(stream.fileno()).st_size))
            with suppress(Malformed):
                while cursor.left:
                    key, place = _record(path, cursor)
                    self._looked_at[path] = cursor.position
                    with self._lock:
                        self._places.setdefault(key, place)

    def _result(self, place: _Place, facts: dict[str, Any], sizes: Sequence[int]) -> Result:
        pieces, start = [], place.data
        for size in sizes:
            pieces.append(Piece(self, place.path, start, size))
            start += size
        return Result(facts, tuple(pieces))


def _record(path: Path, cursor: Cursor) -> tuple[str, _Place]:
    """The key of the next record; Malformed if it is not whole."""
    lengths = cursor.take(_LENGTHS.size)
    magic, length, data = _LENGTHS.unpack(lengths)
    if magic != _MAGIC or length > _LONGEST_HEAD or length + data > cursor.left:
        raise Malformed("it is no record, or not all of one")
    place = _Place(path, cursor.position, cursor.position + length)
    head = cursor.take(length)
    digest = blake3(lengths + head)
    while data:
        count = min(data, _BLOCK)
        digest.update(cursor.take(count))
        data -= count
    if cursor.take(digest.digest_size) != digest.digest():
        raise Malformed("its digest is another one")
    return _parsed(head)[0], place


def _parsed(head: bytes | bytearray) -> tuple[str, dict[str, Any], list[int]]:
    """Key, facts and sizes of a head, whose digest has been seen: it is as it was written."""
    parsed = json.loads(head)
    return parsed["key"], parsed["facts"], parsed["sizes"]


def _fill(descriptor: int, target: memoryview, position: int) -> None:
    while target:
        count = read_at(descriptor, target, position)
        if not count:
            raise OSError(errno.EIO, "a log of results is shorter than what was written")
        target, position = target[count:], position + count
