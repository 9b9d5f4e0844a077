"""Output that appears complete or not at all.

Everything is written into a hidden directory beside the output, flushed to the disk, and renamed
into place at the end. A run that is stopped in any way leaves only that directory; it is locked
while its process runs, so the next run for the same output can tell abandoned output from another
run's, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from loratool.errors import OutputError
from loratool.storage.filenames import PROVENANCE
from loratool.words import format_bytes


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output that exists (unless `overwrite`) or that would touch an input."""
    place = Path(os.path.realpath(output))  # Path.resolve raises RuntimeError for a loop
    for source in filter(os.path.lexists, inputs):  # the others are on the Hub, or errors soon
        there = Path(os.path.realpath(source))
        if place == there or place in there.parents or there in place.parents:
            relation = "is" if place == there else "contains" if place in there.parents else "is in"
            raise OutputError(
                f"The output {output} {relation} the input {source}.",
                "Inputs are never written to; choose another place for the output.",
            )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists.", "Choose another name, or replace it: --overwrite.")
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} is not a directory.", "Choose another name.")
    weights = [p for p in output.iterdir() if p.suffix in (".safetensors", ".bin", ".json")]
    model = (output / PROVENANCE).exists() or {".json"} < {p.suffix for p in weights}
    if any(output.iterdir()) and not model:
        raise OutputError(
            f"{output} does not look like a model or an adapter, so it is not overwritten.",
            "Remove it yourself, or choose another name.",
        )


def free_bytes(output: Path) -> int:
    """Bytes that can be written where `output` will be."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


class StagedDirectory:
    """A directory that becomes `output` when `commit` is called, and vanishes otherwise.

    Use as a context manager; `path` is where to write. What the system says about a write that
    fails becomes an OutputError.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.output = output.absolute()
        self.path = Path()
        self._overwrite = overwrite
        self._lock = -1
        self._made: list[Path] = []

    def __enter__(self) -> StagedDirectory:
        parent = self.output.parent
        try:
            self._made = [p for p in (parent, *parent.parents) if not p.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.output)
            self._refuse_other_run()  # abandoned output may have been the old one, put back
            while not self._make_and_lock():
                pass
            # mkdtemp makes it private; the result gets the permissions any new directory gets.
            umask = os.umask(0)
            os.umask(umask)
            self.path.chmod(0o777 & ~umask)
        except BaseException as error:  # also Ctrl-C: nobody else would clean up yet
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
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self.path != self.output:
            if self.path != Path():
                shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._made:
                with suppress(OSError):  # not empty: somebody else uses it by now
                    parent.rmdir()
        if said is not None:
            raise said from error

    def _make_and_lock(self) -> bool:
        """Make the directory and lock it; False if another run took it for abandoned meanwhile.

        The directory itself is locked: a lock file would have to go before the rename.
        """
        prefix = _prefix(self.output, "partial")
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists():
                return True
        except (FileNotFoundError, BlockingIOError):
            pass
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        return False

    def commit(self) -> None:
        """Flush what is not flushed yet and put the directory in the output's place."""
        self._refuse_other_run()
        for folder, _, files in os.walk(self.path):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        self._refuse_other_run()
        if os.path.lexists(self.output):
            # Rename twice; a crash in between leaves the old output under a name that the next
            # run knows, and puts back.
            old = self.output.with_name(_prefix(self.output, "replaced") + str(os.getpid()))
            os.rename(self.output, old)
            os.rename(self.path, self.output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.path, self.output)
        self.path = self.output
        with suppress(PermissionError):  # a parent one may write to but not read
            sync(self.output.parent)

    def _refuse_other_run(self) -> None:
        if os.path.lexists(self.output) and not self._overwrite:
            raise OutputError(
                f"{self.output} appeared while this run was writing.",
                "Another run was faster; remove its output, or choose another name.",
            )


def _prefix(output: Path, what: str) -> str:
    return f".{output.name}.loratool-{what}-"


def _beside(output: Path, what: str) -> list[Path]:
    return [p for p in output.parent.iterdir() if p.name.startswith(_prefix(output, what))]


def _remove_abandoned(output: Path) -> None:
    """Remove what runs for the same output abandoned; leave what a running process is writing."""
    for old in _beside(output, "replaced"):
        if os.path.lexists(output):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, output)
    for partial in _beside(output, "partial"):
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems cannot sync a directory; their renames are as safe as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def explain(error: OSError, output: Path) -> OutputError:
    """The error for a write towards `output` that failed, in words."""
    place = output.absolute().parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {format_bytes(free_bytes(output))} are left at {place}.",
            "Free some space, or write to another disk. Nothing was left behind.",
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{output}: one of its files would grow larger than this system allows.",
            "Raise the limit (ulimit -f), or write to another file system.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{place}: not allowed to write there.", "Choose another place.")
    return OutputError(f"{output}: writing failed ({error.strerror}).", "Nothing was left behind.")


def refuse_full_disk(needed: int, target: Path) -> None:
    free = free_bytes(target)
    if needed > free:
        raise OutputError(
            f"The output needs {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free at {target.absolute().parent}.",
            "Free some space, or write to another disk.",
        )
