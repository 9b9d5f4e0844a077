"""The folder in which an output is made that takes long: by one run, or by several.

It lies beside the output and has a name that the next run knows, so what is finished in it is not
made twice, however the run before ended:

    .OUT.loratool-work/
        order.json        what the output is made by; runs that make the same bytes have the same
        shared            there if workers make it, side by side and maybe on several machines
        output/           finished files; one run calls it `finishing-…` and makes the output of it
        done/NAME.json    an entry of each finished file, see `journal`
        parts/            finished files that the output will not have as they are
        results/          what is no file: logs of results, see `streams.results`
        by-…/             what one process is making

A run by itself locks the folder, so that a second one learns of it. Workers take no lock, which
network file systems may not have: all that they do is to make files under names of their own and
to rename them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loratool.errors import LoraToolError, OutputError
from loratool.notices import Notice
from loratool.storage.placing import (
    change_places,
    clean_up,
    flush_place,
    make_ready,
    prefix,
)
from loratool.storage.presence import Overtaken, Presence
from loratool.storage.system import uninterrupted
from loratool.storage.worksites import (
    FINISHING,
    OUTPUT,
)

#: How often a file is looked for whose folder others rename, and seconds between two looks.
_TRIES, _PAUSE = 10, 0.01

#: Seconds after which a process that completes an output, and changes nothing, counts as dead. If
#: it is alive after all, it finds its folder gone.
_PATIENCE = 60.0


class WorkFolder(Presence):
    """The work of one process for an output. Use as a context manager.

    `own` is where to make files, `finished` where they are then. Files are those of the order.
    """

    def note_of(self, name: str) -> dict[str, Any] | None:
        """What was noted of a file of the order when it was finished; None if it is not."""
        if name not in self.order.files:
            return None
        for _ in range(_TRIES):
            note = self._journal.note_of(name, (self.finished, self.path / OUTPUT))
            if note is not None or not self._shared:
                return note
            self._refuse_gone()
            if not self._journal.has(name):
                return None
            time.sleep(_PAUSE)  # its folder just got another name
        return None

    def note(self, name: str) -> dict[str, Any]:
        """What was noted of a finished file. Raises OutputError where it is not as it was."""
        found = self.note_of(name)
        if found is None:
            raise OutputError(
                f"{self.finished / name} was finished, and is not any more as it was.",
                "Look after the disk, and run the command again.",
            )
        return found

    def missing(self) -> list[str]:
        """The files of the order that nobody has finished."""
        return [name for name in self.order.files if self.note_of(name) is None]

    def publish(self, name: str, digest: str, note: Mapping[str, Any], *parts: str) -> None:
        """Let a file that is flushed in `own` be finished, and the `parts` that go with it."""
        try:
            for part in parts:
                os.replace(self.own / part, self.parts / part)
            self._journal.enter(self.own / name, self.finished, digest, note)
        except FileNotFoundError:
            if not self._shared:
                raise
            self._refuse_unless_made(name)

    def _refuse_unless_made(self, name: str) -> None:
        """Raise Overtaken where the folder was finished by others while this file was made."""
        self._refuse_gone()
        if self.note_of(name) is None:
            raise OutputError(
                f"{self.path} was changed while {name} was made in it.",
                "Run the command again.",
            )

    @contextmanager
    def finishing(self, take_over: bool = False) -> Iterator[Path]:
        """The folder of all finished files, for one process alone, to be completed in the block
        and put into place by `commit`.

        Raises Overtaken where another process has it; with `take_over` it is taken from that one.
        """
        mine = self.path / f"{FINISHING}{secrets.token_hex(8)}"
        before = self._finishing() if take_over else None
        try:
            os.rename(before or self.path / OUTPUT, mine)
        except FileNotFoundError:
            raise Overtaken(
                f"Another process completes {self.output}.",
                f"If it was killed: loratool finish {self.output}",
            ) from None
        self._clean(mine)
        try:
            yield mine
        except BaseException as error:
            known = isinstance(error, OSError | LoraToolError)
            if not self._placed and not self._gave_back(mine) and known:
                raise Overtaken(
                    f"Another process took over to complete {self.output}.",
                    "Nothing is left to do here.",
                ) from error
            raise

    def _gave_back(self, mine: Path) -> bool:
        """Call the folder as it was before `finishing`; False where another process has it."""
        try:
            os.rename(mine, self.path / OUTPUT)
        except OSError:
            return False
        return True

    def is_gone_after_waiting(self) -> bool:
        """Wait while another process completes the output: True when the work is over, False when
        the folder is free again or nothing has moved in it for some time."""
        seen, since = self._traces(), time.monotonic()
        while time.monotonic() - since < _PATIENCE:
            if not self.path.is_dir():
                return True
            if (self.path / OUTPUT).is_dir():
                return False
            time.sleep(10 * _PAUSE)
            if (now := self._traces()) != seen:
                seen, since = now, time.monotonic()
        return False

    def _traces(self) -> list[tuple[str, int, int]]:
        """What whoever completes the output changes while it lives: names, sizes and times."""
        found = []
        with suppress(OSError):
            for place, _, names in os.walk(self._finishing() or self.path):
                for name in names:
                    there = os.stat(os.path.join(place, name))
                    found.append((name, there.st_size, there.st_mtime_ns))
        return sorted(found)

    def commit(self, made: Path) -> list[Notice]:
        """Put the folder that `finishing` gave, now complete, into the output's place.

        Returns a warning where what it replaced could not be removed.
        """
        make_ready(made, self.output, self._overwrite)
        with uninterrupted():
            old = change_places(made, self.output)
            self._placed = True
            flush_place(self.output, old)
            # Gone at once, so that no worker who is late finds a half of it.
            gone = self.output.with_name(prefix(self.output, "partial") + secrets.token_hex(8))
            try:
                os.rename(self.path, gone)
            except OSError:
                gone = self.path
            return clean_up(self.output, *([old] if old and old != made else []), gone)
