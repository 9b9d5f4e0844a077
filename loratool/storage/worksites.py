"""The work folder of an output seen from outside: where it is, what lies in it, whose it is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from loratool.errors import OutputError
from loratool.storage.destination import refuse
from loratool.storage.journal import WorkOrder, read_order
from loratool.storage.placing import alone_in, another_run, beside, place_of, prefix, remove
from loratool.storage.system import lock_folder

#: What there is in a work folder; `workfolder` says what it is for.
ORDER, SHARED, OUTPUT, DONE = "order.json", "shared", "output", "done"
PARTS, RESULTS = "parts", "results"
#: How names in it begin: the output while one process completes it, and what a process makes.
FINISHING, OWN = "finishing-", "by-"


def work_of(output: Path) -> Path:
    """The folder in which an output is made."""
    output = place_of(output)
    return output.with_name(prefix(output, "work")[:-1])


def order_for(output: Path) -> WorkOrder | None:
    """The order of an output that is being made; None where there is none."""
    return read_order(work_of(output) / ORDER)


def finished_bytes(output: Path) -> int:
    """Bytes that lie in the folder of an output, and need not be free when it is made: they are
    taken up, or removed."""
    path = work_of(output)
    found = 0
    for place in (*path.glob(f"{FINISHING}*"), path / OUTPUT, path / PARTS, path / RESULTS):
        with suppress(OSError):
            found += sum(entry.stat().st_size for entry in place.iterdir())
    return found


def refuse_other_run(output: Path) -> None:
    """Refuse an output that another run makes, before this one has done any work for it."""
    output = place_of(output)
    if not output.parent.is_dir():
        return
    # No run takes its folder meanwhile, which would find it locked by this look.
    with suppress(OSError), alone_in(output.parent):
        for folder in (work_of(output), *beside(output, "partial")):
            try:
                lock = lock_folder(folder)
            except BlockingIOError:
                refuse(another_run(output))
                return
            except OSError:  # it is not there
                continue
            if lock is not None:
                os.close(lock)


def clear_abandoned_work(output: Path) -> None:
    """Remove the work for an output that no run does any more, because another one begins.

    Raises OutputError where a run does, or workers may.
    """
    path = work_of(output)
    if not path.is_dir():
        return
    try:
        lock = lock_folder(path)
    except BlockingIOError:
        raise another_run(output) from None
    except OSError:
        return
    if lock is None:  # nobody can tell whether a run does
        return
    try:
        if (path / SHARED).exists():
            raise OutputError(
                f"Workers make {output}.",
                f"Let them end, or choose another name. If none runs any more: remove {path}.",
            )
        remove(path)
    finally:
        os.close(lock)
