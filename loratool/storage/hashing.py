"""sha256 of files and bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loratool.storage.bounded import open_regular


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
