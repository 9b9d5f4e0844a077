"""A zip archive whose entries lie in it uncompressed, and where each of them lies.

Only what says so unmistakably is read: one disk, no encryption, no name twice, no entry that
reaches into another one or out of the file, and the same name in both places that give it. Python's
zipfile forgives most of that, and two programs that forgive differently see different files.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from loratool.storage.bounded import LONGEST_LIST, Cursor, Malformed

#: What a file begins with that is such an archive.
LOCAL = b"PK\x03\x04"

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_HEADER = struct.Struct("<4s5H3I2H")

#: In place of a number that stands elsewhere, in 64 bits.
_ELSEWHERE = 0xFFFF, 0xFFFFFFFF

#: Flags of entries that are encrypted, in three ways.
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UTF8 = 0x800


class Entry(NamedTuple):
    """`place` is where its own header begins and `end` what it cannot reach beyond."""

    raw_name: bytes
    place: int
    end: int
    size: int
    crc: int
    is_compressed: bool


class Archive:
    """The entries of the archive that a stream of `size` bytes holds, by name.

    Raises Malformed for everything that is not as it should be.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        start, end, count = _directory(stream, size)
        if end - start > LONGEST_LIST:
            raise Malformed(f"its directory of entries has {end - start:,} bytes")
        self.entries = _entries(Cursor(stream, start, end), count, start)

    def locate(self, name: str) -> int:
        """The byte that the data of an uncompressed entry begins at."""
        entry = self.entries[name]
        cursor = Cursor(self._stream, entry.place, entry.end)
        signature, *_, name_length, extra_length = _HEADER.unpack(cursor.take(_HEADER.size))
        if signature != LOCAL or cursor.take(name_length) != entry.raw_name:
            raise Malformed(f"the entry {name[:200]!r} is not where the directory says")
        cursor.skip(extra_length)
        if entry.size > cursor.left:
            raise Malformed(f"the entry {name[:200]!r} reaches into what is behind it")
        return cursor.position

    def open(self, name: str) -> Cursor:
        start = self.locate(name)
        return Cursor(self._stream, start, start + self.entries[name].size)


def _directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many entries it has."""
    start = max(0, size - _END.size - 0xFFFF)
    tail = Cursor(stream, start, size).take(size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise Malformed("its end is missing, where the directory of a zip archive would be")
    _, *small, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise Malformed("there is something behind the end of the archive")
    end = start + at
    fields = small
    if at >= _LOCATOR.size and tail.startswith(b"PK\x06\x07", at - _LOCATOR.size):
        locator = end - _LOCATOR.size
        _, disk, place, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if disk or disks > 1 or place + _END64.size > locator:
            raise Malformed("its directory is said to be where it cannot be")
        record = Cursor(stream, place, locator).take(_END64.size)
        signature, _, _, _, *fields = _END64.unpack(record)
        if signature != b"PK\x06\x06" or any(
            one not in (other, *_ELSEWHERE) for one, other in zip(small, fields, strict=True)
        ):
            raise Malformed("what it says of its directory in 64 bits contradicts the rest")
        end = place
    disk, first_disk, here, count, length, offset = fields
    if disk or first_disk or here != count:
        raise Malformed("it is a part of an archive of several disks")
    if offset + length != end:
        raise Malformed("its directory is not where it is said to be")
    return offset, end, count


def _entries(cursor: Cursor, count: int, data_end: int) -> dict[str, Entry]:
    """The entries of the directory at the cursor, all of which lie before `data_end`."""
    found: list[tuple[str, Entry]] = []
    while cursor.left:
        fields = _CENTRAL.unpack(cursor.take(_CENTRAL.size))
        signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        name_length, extra_length, comment_length, disk, _, _, place = fields[10:]
        raw_name, extra = cursor.take(name_length), cursor.take(extra_length)
        cursor.skip(comment_length)
        if signature != b"PK\x01\x02":
            raise Malformed("its directory is damaged")
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")
        size, packed, place = _widened(extra, size, packed, place)
        if flags & _ENCRYPTED:
            raise Malformed(f"the entry {name[:200]!r} is encrypted")
        if disk or "\0" in name or (method == 0 and size != packed):
            raise Malformed(f"the entry {name[:200]!r} is no plain file")
        end = place + _HEADER.size + name_length + packed
        found.append((name, Entry(raw_name, place, end, size, crc, method != 0)))
    if len(found) != count:
        raise Malformed(f"it announces {count:,} entries and lists {len(found):,}")
    entries: dict[str, Entry] = {}
    follower = data_end
    for name, entry in sorted(found, key=lambda item: -item[1].place):
        if entry.end > follower:
            raise Malformed(f"the entry {name[:200]!r} reaches into what is behind it")
        if name in entries:
            raise Malformed(f"it has two entries called {name[:200]!r}")
        entries[name] = entry._replace(end=follower)
        follower = entry.place
    return entries


def _widened(extra: bytes, *numbers: int) -> list[int]:
    """Numbers of an entry, those that do not fit into 32 bits from its extra field."""
    missing = [i for i, number in enumerate(numbers) if number == _ELSEWHERE[1]]
    result = list(numbers)
    at = 0
    while missing and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and length >= 8 * len(missing) and at + 4 + length <= len(extra):
            for i, number in enumerate(struct.unpack_from(f"<{len(missing)}Q", extra, at + 4)):
                result[missing[i]] = number
            return result
        at += 4 + length
    if missing:
        raise Malformed("an entry does not say how long it is")
    return result
