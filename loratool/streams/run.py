"""How a run goes, apart from what it does: threads, progress, what may be written, on what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.errors import UsageError
from loratool.storage.destination import Overwrite
from loratool.streams.progress import Advance, Progress
from loratool.streams.shares import WorkShare

_OMIT = "Omit --worker, or --dry-run."


@dataclass(frozen=True)
class Run:
    """The options that verbs share and hand down unchanged.

    `threads` None takes the cores. A dry run reports and writes nothing; `overwrite` replaces an
    output that exists. `device` is where torch computes: "cpu" or "cuda". `restart` makes again
    what an earlier run had finished. With a `share` others make the rest of the output; with a
    `cluster`, an address of Ray's or "" for one on this machine, its tasks make all of it.
    """

    threads: int | None = None
    progress: Progress | None = None
    overwrite: Overwrite = False
    dry_run: bool = False
    device: str = "cpu"
    restart: bool = False
    share: WorkShare | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.dry_run:
            raise UsageError("A dry run makes nothing, so there is nothing to share.", _OMIT)
        if self.share is not None and self.cluster is not None:
            raise UsageError("--ray splits the work by itself.", "Omit --worker.")
        if self.share is not None and self.restart:
            raise UsageError(
                "--restart would throw away what other workers have finished.",
                "To begin anew, let none run, and remove the hidden folder beside the output.",
            )
        if self.threads is not None and self.threads < 1:
            raise UsageError(
                f"--threads must be at least 1 (got {self.threads}).", "Omit it to use all cores."
            )

    def counted(self, total: int) -> Advance:
        """Takes counts of single steps, of `total` bytes in all, and shows their sum."""
        done = 0

        def advance(count: int, label: str) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(done, total, label)

        return advance

    def silent(self) -> Run:
        """The same without progress."""
        return replace(self, progress=None)
