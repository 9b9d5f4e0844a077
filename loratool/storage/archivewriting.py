"""Writing a zip archive of uncompressed entries, whose every byte has its place beforehand.

What an entry holds may then be written by position; its own header and the directory, which both
have its checksum, come when that is known. There are no dates in it: the same content gives the
same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from loratool.storage.archive import LOCAL

#: The first day that an archive can name.
_DATE = 0x21
_FULL = 0xFFFFFFFF

#: An extra field that nobody reads, by the two letters that torch uses; it moves the data to where
#: it should begin.
_FILLER = b"FB"


class Slot(NamedTuple):
    """An entry: where its header and its data begin."""

    name: bytes
    place: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + self.size


def slots(entries: Sequence[tuple[str, int]], alignment: int) -> list[Slot]:
    """Where entries, each an ASCII name and a size in bytes, lie one after the other; the data of
    each begins at a multiple of `alignment`."""
    found: list[Slot] = []
    place = 0
    for name, size in entries:
        raw = name.encode("ascii")
        least = place + 30 + len(raw) + len(_wide(size, size)) + 4
        found.append(Slot(raw, place, -(-least // alignment) * alignment, size))
        place = found[-1].end
    return found


def entry_header(slot: Slot, crc: int) -> bytes:
    """All that lies between the place of an entry and its data."""
    wide = _wide(slot.size, slot.size)
    fill = slot.data - slot.place - 30 - len(slot.name) - len(wide) - 4
    extra = wide + _FILLER + struct.pack("<H", fill) + bytes(fill)
    size = min(slot.size, _FULL)
    return (
        struct.pack(
            "<4s5H3I2H", LOCAL, 45 if wide else 20, 0, 0, 0, _DATE, crc, size, size,
            len(slot.name), len(extra),
        )
        + slot.name + extra
    )  # fmt: skip


def directory(found: Sequence[Slot], crcs: Sequence[int]) -> bytes:
    """All that lies behind the last entry."""
    records = b"".join(map(_record, found, crcs))
    start = found[-1].end
    end, counts, places = start + len(records), [len(found)] * 2, [len(records), start]
    wide = b""
    if end > _FULL - 1 or len(found) > 0xFFFF - 1:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *counts, *places)
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    small = [min(n, 0xFFFF) for n in counts] + [min(n, _FULL) for n in places]
    return records + wide + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *small, 0)


def _record(slot: Slot, crc: int) -> bytes:
    """What the directory says of an entry."""
    numbers = [slot.size, slot.size, slot.place]
    wide = _wide(*numbers)
    packed, size, place = (min(n, _FULL) for n in numbers)
    version = 45 if wide else 20
    return (
        struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", version, version, 0, 0, 0, _DATE, crc, packed, size,
            len(slot.name), len(wide), 0, 0, 0, 0, place,
        )
        + slot.name + wide
    )  # fmt: skip


def _wide(*numbers: int) -> bytes:
    """The extra field with those numbers that do not fit into 32 bits; nothing if all do."""
    large = [n for n in numbers if n >= _FULL]
    return struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
