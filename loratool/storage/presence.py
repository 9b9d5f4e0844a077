"""How a process comes to the work folder of an output, and how it goes."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from loratool.errors import LoraToolError, OutputError, listed
from loratool.notices import Notice
from loratool.storage.destination import Overwrite, explain
from loratool.storage.journal import Journal, WorkOrder, read_order, replace_json
from loratool.storage.placing import (
    alone_in,
    another_run,
    clear,
    place_of,
    refuse_other_output,
    remove,
)
from loratool.storage.system import lock_folder, uninterrupted
from loratool.storage.worksites import (
    DONE,
    FINISHING,
    ORDER,
    OUTPUT,
    OWN,
    PARTS,
    RESULTS,
    SHARED,
    work_of,
)
from loratool.words import counted

#: How often a folder is made that another run removes meanwhile.
_TRIES = 10

#: What runs of this process left for the next one: the folder, files finished, files in all.
_LEFT: list[tuple[Path, int, int]] = []


def left_work() -> tuple[tuple[Path, int, int], ...]:
    """What runs of this process left to go on with: folder, finished files, files in all."""
    return tuple(_LEFT)


class Overtaken(LoraToolError):
    """Another process finishes, or has finished, the output that this one worked for."""

    code = "overtaken"


P = TypeVar("P", bound="Presence")


class Presence(ABC):
    """A process in the folder: it comes alone, with a lock, or with `shared` beside others, as a
    `guest` of a run that has the lock or of none, and leaves what is finished there and nothing
    else. `WorkFolder` is what it can do meanwhile."""

    def __init__(
        self,
        output: Path,
        order: WorkOrder,
        overwrite: Overwrite = False,
        restart: bool = False,
        shared: bool = False,
        guest: bool = False,
    ) -> None:
        self.output = place_of(output)
        self.path = work_of(output)
        self.order = order
        #: What a user should know of the work that was there.
        self.notices: list[Notice] = []
        self.own = self.path / f"{OWN}{socket.gethostname()[:40]}-{secrets.token_hex(8)}"
        self.parts, self.results = self.path / PARTS, self.path / RESULTS
        self._overwrite, self._restart = overwrite, restart
        self._shared, self._guest = shared, guest
        self._journal = Journal(self.path / DONE)
        self._lock: int | None = None
        self._made: list[Path] = []
        self._mine = self._placed = False

    @abstractmethod
    def note_of(self, name: str) -> dict[str, Any] | None:
        """What was noted of a file of the order when it was finished; None if it is not."""

    @property
    def finished(self) -> Path:
        """Where the finished files are."""
        return self._finishing() or self.path / OUTPUT

    def __enter__(self: P) -> P:
        parent = self.output.parent
        try:
            self._made = [p for p in (parent, *parent.parents) if not p.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            if self._shared:
                try:
                    self._join()
                except FileNotFoundError:
                    self._refuse_gone()
                    raise
            else:
                with alone_in(parent):
                    clear(self.output)
                    refuse_other_output(self.output, self._overwrite)
                    with uninterrupted():
                        self._take()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _take(self) -> None:
        """Have the folder for this run alone, with what is finished in it."""
        self._make_and_lock()
        found = read_order(self.path / ORDER)
        differing = found.differences(self.order) if found is not None else []
        shared = (self.path / SHARED).exists()
        if found is None or differing or self._restart:
            if differing and shared and not self._restart:
                raise self._other_work(differing)
            self._empty()
            shared = False
            if differing and not self._restart:
                text = (
                    "What an earlier run had finished for this output is not taken up, because "
                    f"it was made of something else:\n{listed(differing)}"
                )
                self.notices.append(Notice("begun-anew", text, str(self.output)))
        self._begin()
        if not shared:
            self._tidy()
        self._note_taken_up()

    def _make_and_lock(self) -> None:
        """Make the folder, if it is not there, and lock it. The run before may just remove it."""
        for _ in range(_TRIES):
            self.path.mkdir(exist_ok=True)
            try:
                self._lock = lock_folder(self.path)
                if self._lock is None or os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                    return
                os.close(self._lock)
            except BlockingIOError:
                raise another_run(self.output) from None
            except FileNotFoundError:
                pass
            except OSError:
                with suppress(OSError):  # not empty: it was there
                    self.path.rmdir()
                raise
        raise another_run(self.output)

    def _join(self) -> None:
        """Work in the folder beside others."""
        refuse_other_output(self.output, self._overwrite)
        self.path.mkdir(exist_ok=True)
        found = read_order(self.path / ORDER)
        differing = found.differences(self.order) if found is not None else []
        if differing:
            raise self._other_work(differing)
        self._begin()
        if not self._guest:
            (self.path / SHARED).touch()
        # Of several that begin at once the last one's order stays.
        found = read_order(self.path / ORDER)
        if found is not None and (differing := found.differences(self.order)):
            raise self._other_work(differing)

    def _other_work(self, differing: list[str]) -> OutputError:
        return OutputError(
            f"Workers make {self.output} of something else:\n{listed(differing)}",
            "Let all of them have the same inputs, options and versions; or, when none of them "
            f"runs any more, remove {self.path}.",
        )

    def _begin(self) -> None:
        self._mine = True
        for name in (OUTPUT, DONE, PARTS):
            if name != OUTPUT or self._finishing() is None:
                (self.path / name).mkdir(exist_ok=True)
        self.own.mkdir()
        replace_json(self.path / ORDER, self.own / ORDER, self.order.to_dict())

    def _empty(self) -> None:
        for entry in list(self.path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _tidy(self) -> None:
        """Remove what a run left that is no finished file."""
        finishing = self._finishing()
        if finishing is not None:
            os.rename(finishing, self.path / OUTPUT)
        for entry in self.path.iterdir():
            if entry.name.startswith(OWN) and entry != self.own:
                remove(entry)
        self._clean(self.path / OUTPUT)

    def _clean(self, folder: Path) -> None:
        """Leave nothing but finished files in a folder."""
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif self.note_of(entry.name) is None:
                entry.unlink()

    def _note_taken_up(self) -> None:
        done = [name for name in self.order.files if self.note_of(name) is not None]
        if done:
            text = (
                f"{len(done)} of {counted(len(self.order.files), 'file')} had been finished by "
                "an earlier run and are taken up. --restart makes them again."
            )
            self.notices.append(Notice("taken-up", text, str(self.output)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shared and self._mine and isinstance(error, FileNotFoundError):
            self._refuse_gone()  # others completed the output while this one wrote
        # Said while the files are there: afterwards a full disk has room again.
        said = explain(error, self.output) if isinstance(error, OSError) else None
        done = 0
        if self._mine and not self._placed and self.path.is_dir():
            remove(self.own)
            # What is wrong with inputs stays wrong, and a full disk gets its space back; what else
            # ended the run, a signal above all, may not end the next one.
            known = isinstance(error, LoraToolError) and not error.keeps_work
            if not self._shared and not known and not isinstance(error, OSError):
                with suppress(OSError):
                    self._tidy()
                    done = self._done()
            if done:
                _LEFT.append((self.path, done, len(self.order.files)))
            elif not self._shared:
                remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in self._made:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        if said is not None:
            raise said from error

    def _done(self) -> int:
        """How many files are finished, or for what has none how many logs of results there are."""
        logs = list(self.results.iterdir()) if self.results.is_dir() else []
        return len(logs) + sum(self.note_of(name) is not None for name in self.order.files)

    def _refuse_gone(self) -> None:
        """Raise Overtaken where the work is over, and its folder gone."""
        if not self.path.is_dir():
            raise Overtaken(
                f"{self.output} was completed by another process meanwhile.",
                "Look whether it is there; if not, run the command again.",
            )

    def _finishing(self) -> Path | None:
        with suppress(FileNotFoundError):
            for entry in self.path.iterdir():
                if entry.name.startswith(FINISHING):
                    return entry
        return None
