"""Zip archives: what Python and torch write is found; what is ambiguous is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loratool.storage.archive import Archive
from loratool.storage.bounded import Malformed

FILES = {"x/data.pkl": b"pickle", "x/data/0": b"0123456789", "x/data/1": b"", "x/é": b"abc"}


def zipped(comment: bytes = b"", **changes: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.comment = comment
        for name, content in FILES.items():
            info = zipfile.ZipInfo(name)
            for field, value in changes.items():
                setattr(info, field, value)
            archive.writestr(info, content)
    return stream.getvalue()


def opened(data: bytes) -> dict[str, bytes]:
    archive = Archive(io.BytesIO(data), len(data))
    found = {}
    for name in archive.entries:
        cursor = archive.open(name)
        found[name] = cursor.take(cursor.left)
    return found


def refused(data: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        opened(data)


def test_what_python_writes_is_found() -> None:
    """Names, also those that are not ASCII, and contents are those that were written."""
    assert opened(zipped()) == FILES
    assert opened(zipped(comment=b"written by hand", extra=b"\x99\x99\x02\x00ab")) == FILES


def test_what_torch_writes_is_found() -> None:
    """torch writes 64-bit records and pads the data of its entries; Python finds the same in it."""
    stream = io.BytesIO()
    torch.save({"w": torch.arange(5.0), "v": torch.ones(3)}, stream)
    with zipfile.ZipFile(stream) as archive:
        wanted = {name: archive.read(name) for name in archive.namelist()}
    assert opened(stream.getvalue()) == wanted


def test_numbers_of_64_bits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and places that stand in the extra field, as in files above 4 GB, are used."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 5)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    data = zipped()
    assert b"PK\x06\x06" in data
    assert opened(data) == FILES


def central(data: bytes, number: int) -> int:
    """Where the directory's record of an entry begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    new = struct.pack(form, value)
    return data[:at] + new + data[at + len(new) :]


DATA = zipped()
END = DATA.rindex(b"PK\x05\x06")
FIRST, SECOND = central(DATA, 0), central(DATA, 1)
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "end-missing": (lambda: DATA[:END], "end is missing"),
    "cut": (lambda: DATA[:-1], "end is missing"),
    "bytes-behind": (lambda: DATA + b"more", "behind the end"),
    "bytes-before": (lambda: b"more" + DATA, "directory is not where"),
    "second-disk": (lambda: put(DATA, END + 4, "<H", 1), "several disks"),
    "directory-on-second-disk": (lambda: put(DATA, END + 6, "<H", 1), "several disks"),
    "fewer-on-this-disk": (lambda: put(DATA, END + 8, "<H", 3), "several disks"),
    "more-entries": (lambda: put(put(DATA, END + 8, "<H", 5), END + 10, "<H", 5), "announces 5"),
    "directory-elsewhere": (lambda: put(DATA, END + 16, "<I", 0), "directory is not where"),
    "directory-beyond": (lambda: put(DATA, END + 16, "<I", 1 << 31), "directory is not where"),
    "signature": (lambda: put(DATA, SECOND, "<I", 0), "directory is damaged"),
    "encrypted": (lambda: put(DATA, FIRST + 8, "<H", 1), "encrypted"),
    "masked": (lambda: put(DATA, FIRST + 8, "<H", 0x2000), "encrypted"),
    "entry-on-second-disk": (lambda: put(DATA, FIRST + 34, "<H", 1), "no plain file"),
    "two-sizes": (lambda: put(DATA, SECOND + 24, "<I", 9), "no plain file"),
    "size-elsewhere": (lambda: put(DATA, SECOND + 24, "<I", 0xFFFFFFFF), "how long"),
    "size-too-long": (
        lambda: put(put(DATA, SECOND + 20, "<I", 500), SECOND + 24, "<I", 500), "reaches into"
    ),
    "one-byte-too-long": (
        lambda: put(put(DATA, SECOND + 20, "<I", 11), SECOND + 24, "<I", 11), "reaches into"
    ),
    "place-of-the-first": (lambda: put(DATA, SECOND + 42, "<I", 0), "reaches into"),
    "place-beyond": (lambda: put(DATA, SECOND + 42, "<I", 1 << 30), "reaches into"),
    "place-of-nothing": (lambda: put(DATA, SECOND + 42, "<I", 41), "reaches into|not where"),
    "name-twice": (lambda: DATA.replace(b"x/data/1", b"x/data/0"), "two entries"),
    "other-name-at-its-place": (lambda: put(DATA, FIRST + 46, "<B", ord("y")), "not where"),
    "nul-in-a-name": (lambda: DATA.replace(b"x/data/1", b"x/data\0001"), "no plain file"),
    "local-signature": (lambda: put(DATA, 0, "<I", 0), "not where"),
    "local-extra-too-long": (lambda: put(DATA, 28, "<H", 9999), "9,999 bytes where"),
    "local-extra-into-the-next": (lambda: put(DATA, 28, "<H", 3), "reaches into"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_ambiguous_is_refused(case: str) -> None:
    """Two programs that forgive differently would see different files; here none is seen."""
    make, words = BROKEN[case]
    refused(make(), words)


OTHER64 = {"disk": 16, "entries": 32, "size": 40, "place": 48}


@pytest.mark.parametrize("field", OTHER64)
def test_records_of_64_bits_must_agree(field: str) -> None:
    """What torch says twice of its directory, in 32 and in 64 bits, is the same."""
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    data = stream.getvalue()
    refused(put(data, data.rindex(b"PK\x06\x06") + OTHER64[field], "<I", 77), "contradicts")
    at = data.rindex(b"PK\x06\x07")
    refused(put(data, at + 8, "<Q", 1 << 63), "cannot be")
    refused(put(data, at + 16, "<I", 2), "cannot be")


def test_compressed_entries_are_named() -> None:
    """Whoever wants the bytes of an entry is told that they are not in the file as they are."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1000))
    data = stream.getvalue()
    assert Archive(io.BytesIO(data), len(data)).entries["a"].is_compressed
