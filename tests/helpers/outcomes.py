"""What a run left on the disk, and errors that are clear."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

import loratool
from loratool.errors import FileError, LoraToolError


def sha256s(folder: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def beside(output: Path) -> list[str]:
    """The hidden things that runs for `output` left beside it."""
    return sorted(p.name for p in output.parent.iterdir() if ".loratool-" in p.name)


def assert_clean(output: Path) -> None:
    """Nothing exists at `output`, and no leftovers beside it."""
    assert not os.path.lexists(output)
    assert beside(output) == []


def assert_clear(error: LoraToolError, *parts: str) -> None:
    """The message names all `parts`, is short, can be printed, and says what to do next."""
    for part in parts:
        assert part in error.message
    assert len(error.message) < 1500
    assert error.hint
    f"{error.message}{error.hint}".encode()


def refused(
    kind: type[LoraToolError], base: Path, adapter: Path, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Merge, expecting this error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, output, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value


def file_error(run: Any, path: Path, *parts: str) -> FileError:
    """Call `run(path)`, expecting a clear FileError that names the file and `parts`."""
    with pytest.raises(FileError) as caught:
        run(path)
    assert_clear(caught.value, str(path), *parts)
    return caught.value
