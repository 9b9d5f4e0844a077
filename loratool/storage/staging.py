"""Output that appears complete or not at all.

Everything is written into a hidden directory beside the output, flushed to the disk, and put into
place at the end in one step. A run that is stopped in any way leaves only that directory; it is
locked while its process runs, so the next run for the same output can tell abandoned output from
another run's, and removes it.

An output that is replaced changes places with the new one in that step, and is removed after it
has reached the disk. Where a system has no such step there are two renames, nothing can interrupt
the process between them, and what a crash there leaves is put back by the next run that is given
the path of the output.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from loratool.errors import OutputError
from loratool.notices import Notice
from loratool.storage.destination import (
    Overwrite,
    explain,
    is_empty_folder,
    refuse_company,
)
from loratool.storage.folder import Folder
from loratool.storage.system import (
    exchange,
    lock_folder,
    rename_onto_empty,
    sync,
    uninterrupted,
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


class StagedDirectory:
    """A directory that becomes `output` when `commit` is called, and vanishes otherwise.

    Use as a context manager; `path` is where to write. What the system says about a write that
    fails becomes an OutputError.
    """

    def __init__(self, output: Path, overwrite: Overwrite = False) -> None:
        # A folder that is made for its ".." alone would stay behind.
        parent = os.path.realpath(output.parent) if ".." in output.parts else output.parent
        self.output = Path(parent, output.name).absolute()
        self.path = Path()
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> StagedDirectory:
        parent = self.output.parent
        try:
            self._made = [p for p in (parent, *parent.parents) if not p.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(parent):
                _clear(self.output)
                self._refuse_other_output()  # what a crash left aside may have been put back
                with uninterrupted():  # nobody else would clean up yet
                    self._make_and_lock()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Said while the files are there: afterwards a full disk has room again.
        said = explain(error, self.output) if isinstance(error, OSError) else None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self.path != self.output:
            if self.path != Path():
                _remove(self.path)
            for parent in self._made:
                with suppress(OSError):  # not empty: somebody else uses it by now
                    parent.rmdir()
        if said is not None:
            raise said from error

    def _make_and_lock(self) -> None:
        """Make the directory and lock it.

        The directory itself is locked: a lock file would have to go before the rename.
        """
        self.path = Path(
            tempfile.mkdtemp(prefix=_prefix(self.output, "partial"), dir=self.output.parent)
        )
        self._lock = lock_folder(self.path)
        # mkdtemp makes it private; the result gets the permissions any new directory gets.
        umask = os.umask(0)
        os.umask(umask)
        self.path.chmod(0o777 & ~umask)

    def commit(self) -> list[Notice]:
        """Flush what is not flushed yet and put the directory in the output's place.

        Returns a warning where what it replaced could not be removed.
        """
        self._refuse_other_output()
        for folder, _, files in os.walk(self.path, onerror=_fail):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        self._refuse_other_output()
        refuse_company(self.output, Folder(self.path).names(), self._overwrite)
        with uninterrupted():
            old = self._put_into_place()
            self._flush_place(old)
            if old is None or _remove(old):
                return []
        text = f"What {self.output} replaced could not be removed; it takes space at {old}."
        return [Notice("old-output", text, str(old))]

    def _put_into_place(self) -> Path | None:
        """Returns where the output that was replaced is now."""
        old = None
        if not os.path.lexists(self.output) or is_empty_folder(self.output):
            rename_onto_empty(self.path, self.output)
        elif exchange(self.path, self.output):
            old = self.path
        else:
            old = self.output.with_name(_prefix(self.output, "replaced") + str(os.getpid()))
            os.rename(self.output, old)
            try:
                os.rename(self.path, self.output)
            except BaseException:
                os.rename(old, self.output)
                raise
        self.path = self.output
        _PLACED.append(self.output)
        return old

    def _flush_place(self, old: Path | None) -> None:
        """Flush the step that put the output into its place."""
        try:
            with suppress(PermissionError):  # a parent one may write to but not read
                sync(self.output.parent)
        except OSError as error:
            kept = f" What it replaced is kept: {old}." if old else ""
            raise OutputError(
                f"{self.output} is complete and in its place, but its folder could not be flushed "
                f"to the disk ({error.strerror}).{kept}",
                "A power failure may still undo the last step; look after the disk.",
            ) from error

    def _refuse_other_output(self) -> None:
        there = os.path.lexists(self.output) and not is_empty_folder(self.output)
        if there and not self._overwrite:
            raise OutputError(
                f"{self.output} appeared while this run was writing.",
                "Another run was faster; remove its output, or choose another name.",
            )


def _fail(error: OSError) -> None:
    raise error


def _remove(folder: Path) -> bool:
    """Remove a folder, as far as the system lets it. Returns whether it is gone."""
    with suppress(OSError):  # rmtree lets some through
        shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def _prefix(output: Path, what: str) -> str:
    name = os.fsencode(output.name)
    if len(name) > _LONGEST_NAME:  # the whole must still be a name
        return f".{hashlib.sha256(name).hexdigest()}.loratool-{what}-"
    return f".{output.name}.loratool-{what}-"


def _beside(output: Path, what: str) -> list[Path]:
    return [p for p in output.parent.iterdir() if p.name.startswith(_prefix(output, what))]


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
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


def _clear(output: Path) -> None:
    """Remove what runs for the same output left that are gone, or put it back.

    Raises OutputError where one of them is running.
    """
    for partial in _beside(output, "partial"):
        try:
            lock = lock_folder(partial)
        except BlockingIOError:
            raise OutputError(
                f"Another run is writing {output}.", "Wait for it, or choose another name."
            ) from None
        except OSError:  # it is gone, or somebody else's
            continue
        if lock is not None:
            _remove(partial)
            os.close(lock)
    for old in _beside(output, "replaced"):
        if os.path.lexists(output):
            _remove(old)
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
        if _beside(output, "replaced"):
            with _alone_in(output.parent):
                _clear(output)
