"""Digests of files and bytes: BLAKE3 for what loratool alone checks, sha256 for what others do.

As a text a BLAKE3 is "blake3:" and 64 hexadecimal digits, a sha256 the digits alone; so a digest
says by itself what it is, and what was written with either is checked with the same.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from loratool.storage.bounded import open_regular
from loratool.storage.stamps import Stamp, changed_file, stamp_of

#: What the texts of the digests begin with that loratool takes of what it writes.
BLAKE3 = "blake3:"
SHA256 = ""
_DIGEST = re.compile(f"({BLAKE3})?[0-9a-f]{{64}}")


class Hasher:
    """A digest of bytes that come in pieces; of the kind of `like`, a digest or what one begins
    with."""

    def __init__(self, like: str = BLAKE3) -> None:
        self._prefix = BLAKE3 if like.startswith(BLAKE3) else SHA256
        self._digest: Any
        if self._prefix == BLAKE3:
            from blake3 import blake3

            # One thread: the others have work of their own, and pieces are small.
            self._digest = blake3(max_threads=1)
        else:
            self._digest = hashlib.sha256()

    def update(self, data: Any) -> None:
        """Add contiguous bytes: `bytes`, or an array of uint8."""
        self._digest.update(data if isinstance(data, bytes) else memoryview(data))

    @property
    def text(self) -> str:
        return self._prefix + str(self._digest.hexdigest())


def is_digest(text: object) -> bool:
    """Whether a value is the text of a digest of a kind that is known here."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def is_blake3(text: object) -> bool:
    return is_digest(text) and str(text).startswith(BLAKE3)


def is_sha256(text: object) -> bool:
    return is_digest(text) and not is_blake3(text)


def shortened(digest: str) -> str:
    """The kind of a digest and its first digits, for people."""
    return f"{'blake3' if is_blake3(digest) else 'sha256'} {digest.removeprefix(BLAKE3)[:12]}…"


def digest_of(data: bytes, like: str = BLAKE3) -> str:
    """The digest of some bytes, of the kind of `like`."""
    hasher = Hasher(like)
    hasher.update(data)
    return hasher.text


def file_digests(path: Path, *likes: str) -> list[str]:
    """The digests of a file, one of each kind, by one reading."""
    hashers = [Hasher(like) for like in likes]
    with open_regular(path) as stream:
        while piece := stream.read(1 << 20):
            for hasher in hashers:
                hasher.update(piece)
    return [hasher.text for hasher in hashers]


def file_digest(path: Path, like: str = BLAKE3) -> str:
    return file_digests(path, like)[0]


#: What was hashed before in this process, by path and stamp.
_KNOWN: dict[tuple[Path, Stamp], str] = {}


def known_sha256(path: Path) -> str:
    """The sha256 of a file that is asked for more than once while it stays as it is.

    Raises FileError where it went in the meantime.
    """
    try:
        key = path, stamp_of(path)
        if key not in _KNOWN:
            _KNOWN[key] = file_sha256(path)
    except FileNotFoundError:
        raise changed_file(path) from None
    return _KNOWN[key]


def file_sha256(path: Path) -> str:
    return file_digest(path, SHA256)
