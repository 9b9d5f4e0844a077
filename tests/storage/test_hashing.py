"""Digests and what they are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers.digests import blake3_of

from loratool.storage.hashing import (
    BLAKE3,
    SHA256,
    Hasher,
    digest_of,
    file_digest,
    file_digests,
    file_sha256,
    is_blake3,
    is_digest,
    is_sha256,
    shortened,
)

DATA = bytes(range(256)) * 9000


def test_digests_are_those_of_the_libraries(tmp_path: Path) -> None:
    """Of bytes, of files, and in pieces of bytes and arrays; those of a file by one reading too."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    sha256, blake3 = hashlib.sha256(DATA).hexdigest(), blake3_of(DATA)
    assert (digest_of(DATA, SHA256), digest_of(DATA)) == (sha256, blake3)
    assert (file_sha256(path), file_digest(path)) == (sha256, blake3)
    assert file_digests(path, SHA256, BLAKE3) == [sha256, blake3]
    for like, wanted in ((sha256, sha256), (blake3, blake3)):
        hasher = Hasher(like)
        hasher.update(DATA[:1000])
        hasher.update(np.frombuffer(DATA[1000:], np.uint8))
        hasher.update(np.zeros(0, np.uint8))
        assert hasher.text == wanted
        assert file_digest(path, like) == wanted


def test_blake3_of_nothing_is_that_of_the_paper() -> None:
    """The first of the test vectors that the authors publish."""
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest_of(b"") == f"blake3:{empty}"


@pytest.mark.parametrize(
    ("text", "sha256", "blake3"),
    [
        ("0" * 64, True, False), ("blake3:" + "0" * 64, False, True), ("0" * 63, False, False),
        ("A" * 64, False, False), ("sha256:" + "0" * 64, False, False), ("", False, False),
        ("blake3:", False, False), ("0" * 64 + "\n", False, False), (None, False, False),
    ],
)  # fmt: skip
def test_a_digest_says_what_it_is(text: object, sha256: bool, blake3: bool) -> None:
    assert (is_sha256(text), is_blake3(text)) == (sha256, blake3)
    assert is_digest(text) == (sha256 or blake3)


def test_digests_for_people() -> None:
    assert shortened("ab" * 32) == "sha256 abababababab…"
    assert shortened("blake3:" + "ab" * 32) == "blake3 abababababab…"
