"""One small file, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from loratool.errors import OutputError, UsageError
from loratool.storage.system import sync


def check_place(file: Path, option: str, endings: tuple[str, ...]) -> None:
    """Raise for a name that the file of an option cannot have, before anything long is begun.

    Raises UsageError for another ending, OutputError for a folder that is not there, or a path
    that is one.
    """
    if file.suffix.lower() not in endings:
        raise UsageError(
            f"{option} {file}: the name must end in {', '.join(endings)}.",
            f"Write {option} {file.with_suffix(endings[0]).name}.",
        )
    if file.is_dir():
        raise OutputError(f"{file}: this is a directory.", "Give the path of a file.")
    if not file.parent.is_dir():
        raise OutputError(
            f"{file}: there is no directory {file.parent}.", "Make it, or give another path."
        )
    if not os.access(file.parent, os.W_OK):
        raise OutputError(f"{file.parent}: nothing can be written there.", "Give another path.")


def write_file(file: Path, data: bytes) -> None:
    """Write a file, in the place of one that is there. Raises OutputError."""
    draft = file.with_name(f".{file.name[:100]}.loratool-{os.getpid()}")
    try:
        draft.write_bytes(data)
        sync(draft)
        os.replace(draft, file)
    except OSError as error:
        raise OutputError(
            f"{file}: writing failed ({error.strerror}).", "Give a path that can be written."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
