"""Output that appears complete or not at all.

Everything is written into a hidden directory beside the output, flushed to the disk, and put into
place at the end in one step. A run that is stopped in any way leaves only that directory; it is
locked while its process runs, so the next run for the same output can tell abandoned output from
another run's, and removes it. What takes long is made in a `workfolder`, which is not given up so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from loratool.notices import Notice
from loratool.storage.destination import Overwrite, explain
from loratool.storage.placing import (
    alone_in,
    change_places,
    clean_up,
    clear,
    flush_place,
    make_ready,
    place_of,
    prefix,
    refuse_other_output,
    remove,
)
from loratool.storage.system import lock_folder, uninterrupted
from loratool.storage.worksites import clear_abandoned_work

S = TypeVar("S", bound="StagedDirectory")


class StagedDirectory:
    """A directory that becomes `output` when `commit` is called, and vanishes otherwise.

    Use as a context manager; `path` is where to write. What the system says about a write that
    fails becomes an OutputError.
    """

    def __init__(self, output: Path, overwrite: Overwrite = False) -> None:
        self.output = place_of(output)
        self.path = Path()
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self: S) -> S:
        parent = self.output.parent
        try:
            self._made = [p for p in (parent, *parent.parents) if not p.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            with alone_in(parent):
                clear(self.output)
                clear_abandoned_work(self.output)
                # What a crash left aside may have been put back.
                refuse_other_output(self.output, self._overwrite)
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
                remove(self.path)
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
            tempfile.mkdtemp(prefix=prefix(self.output, "partial"), dir=self.output.parent)
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
        make_ready(self.path, self.output, self._overwrite)
        with uninterrupted():
            old = change_places(self.path, self.output)
            self.path = self.output
            flush_place(self.output, old)
            return clean_up(self.output, *([old] if old else []))


class PassingDirectory(StagedDirectory):
    """A directory for what is taken elsewhere file by file, and vanishes at the end.

    It is like a work folder in which nothing is ever found finished.
    """

    @property
    def own(self) -> Path:
        """Where files are made."""
        return self.path

    @property
    def finished(self) -> Path:
        """Where finished files are."""
        return self.path

    def note_of(self, name: str) -> dict[str, Any] | None:
        """Nothing is noted."""
        return None

    def publish(self, name: str, digest: str, note: Mapping[str, Any], *parts: str) -> None:
        """A finished file stays where it is."""
