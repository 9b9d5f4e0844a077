"""Digests as loratool's files hold them, taken with the library itself."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3


def blake3s(folder: Path) -> dict[str, str]:
    """The digest of every safetensors file at the top of a directory, by name."""
    return {p.name: blake3_of(p.read_bytes()) for p in sorted(folder.glob("*.safetensors"))}


def blake3_of(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"
