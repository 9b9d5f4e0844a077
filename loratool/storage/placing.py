"""Put a finished folder into the place of an output, and clear what runs left beside it.

An output that is replaced changes places with the new one in that step, and is removed after it
has reached the disk. Where a system has no such step there are two renames, nothing can interrupt
the process between them, and what a crash there leaves is put back by the next run that is given
the path of the output.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratool.errors import OutputError
from loratool.notices import Notice
from loratool.storage.destination import Overwrite, is_empty_folder, refuse_company
from loratool.storage.folder import Folder
from loratool.storage.system import (
    exchange,
    lock_folder,
    rename_onto_empty,
    sync,
)

#: How often, and after how many seconds, a folder is tried to be locked that another run begins in.
_TRIES, _PAUSE = 100, 0.02

#: Bytes of an output's name up to which the names beside it have it in them.
_LONGEST_NAME = 200

#: The outputs that this process has put into their places.
_PLACED: list[Path] = []


def placed_outputs() -> tuple[Path, ...]:
    """The outputs that are complete: what somebody who interrupts the process now will find."""
    return tuple(_PLACED)


def place_of(output: Path) -> Path:
    """Where an output will be, as an absolute path."""
    # A folder that is made for its ".." alone would stay behind.
    parent = os.path.realpath(output.parent) if ".." in output.parts else output.parent
    return Path(parent, output.name).absolute()


def make_ready(made: Path, output: Path, overwrite: Overwrite) -> None:
    """Flush what is not flushed yet of the folder `made`, which is to take the output's place."""
    refuse_other_output(output, overwrite)
    for folder, _, files in os.walk(made, onerror=_fail):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    refuse_other_output(output, overwrite)
    refuse_company(output, Folder(made).names(), overwrite)


def change_places(made: Path, output: Path) -> Path | None:
    """Put `made` in the output's place. Returns where the output that was replaced is then."""
    old = None
    if not os.path.lexists(output) or is_empty_folder(output):
        rename_onto_empty(made, output)
    elif exchange(made, output):
        old = made
    else:
        old = output.with_name(prefix(output, "replaced") + str(os.getpid()))
        os.rename(output, old)
        try:
            os.rename(made, output)
        except BaseException:
            os.rename(old, output)
            raise
    _PLACED.append(output)
    return old


def flush_place(output: Path, old: Path | None) -> None:
    """Flush the step that put the output into its place; `old` is what it replaced."""
    try:
        with suppress(PermissionError):  # a parent one may write to but not read
            sync(output.parent)
    except OSError as error:
        kept = f" What it replaced is kept: {old}." if old else ""
        raise OutputError(
            f"{output} is complete and in its place, but its folder could not be flushed "
            f"to the disk ({error.strerror}).{kept}",
            "A power failure may still undo the last step; look after the disk.",
        ) from error


def clean_up(output: Path, *folders: Path) -> list[Notice]:
    """Remove what an output replaced, and what is left of the work on it.

    Returns a warning where that could not be.
    """
    for folder in folders:
        remove(folder)
    left = [folder for folder in folders if os.path.lexists(folder)]
    return [
        Notice(
            "old-output",
            f"What {output} replaced, or was made in, could not be removed; it takes space at "
            f"{folder}.",
            str(folder),
        )
        for folder in left[-1:]
    ]


def refuse_other_output(output: Path, overwrite: Overwrite) -> None:
    """Raise OutputError for an output that was not there when this run began."""
    there = os.path.lexists(output) and not is_empty_folder(output)
    if there and not overwrite:
        raise OutputError(
            f"{output} appeared while this run was writing.",
            "Another run was faster; remove its output, or choose another name.",
        )


def _fail(error: OSError) -> None:
    raise error


def remove(folder: Path) -> bool:
    """Remove a folder, as far as the system lets it. Returns whether it is gone."""
    with suppress(OSError):  # rmtree lets some through
        shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def prefix(output: Path, what: str) -> str:
    """How the hidden names beside an output begin."""
    name = os.fsencode(output.name)
    if len(name) > _LONGEST_NAME:  # the whole must still be a name
        return f".{hashlib.sha256(name).hexdigest()}.loratool-{what}-"
    return f".{output.name}.loratool-{what}-"


def beside(output: Path, what: str) -> list[Path]:
    """The hidden folders beside an output that runs left or make for `what`."""
    return [p for p in output.parent.iterdir() if p.name.startswith(prefix(output, what))]


@contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """Let runs that begin in a folder do so one after the other, where it can be locked."""
    lock = None
    for _ in range(_TRIES):
        try:
            lock = lock_folder(parent)
            break
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError:  # a folder that one may write to but not read
            break
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def another_run(output: Path) -> OutputError:
    """The error where a living run makes the output."""
    return OutputError(f"Another run is writing {output}.", "Wait for it, or choose another name.")


def clear(output: Path) -> None:
    """Remove what runs for the same output left that are gone, or put it back.

    Raises OutputError where one of them is running.
    """
    for partial in beside(output, "partial"):
        try:
            lock = lock_folder(partial)
        except BlockingIOError:
            raise another_run(output) from None
        except OSError:  # it is gone, or somebody else's
            continue
        if lock is not None:
            remove(partial)
            os.close(lock)
    for old in beside(output, "replaced"):
        if os.path.lexists(output):
            remove(old)
        else:
            os.rename(old, output)


def recover(output: Path) -> None:
    """Put an output back that is not in its place because a run died while it replaced it.

    Nothing happens where that run is alive: it will put the new one there.
    """
    output = output.absolute()
    if os.path.lexists(output) or not output.parent.is_dir():
        return
    with suppress(OSError, OutputError):
        if beside(output, "replaced"):
            with alone_in(output.parent):
                clear(output)
