"""What operating systems do differently: reads and writes by position, locks, flushes, renames.

Every name that only POSIX has stands here, beside a way that works without it. Two things have no
other way: where folders cannot be locked (Windows) two runs for one output do not see each other,
and what a run left that was killed is not removed by the next one.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

#: Not inherited by other programs, and on Windows the bytes as they are.
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

#: What ends a process politely.
_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

#: Where reads and writes by position are missing, a descriptor has one place, which is shared.
_seeking = threading.Lock()


def open_to_read(path: Path) -> int:
    """A descriptor of a file that is there; the opening of a pipe waits for nobody."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _FLAGS)


def open_new(path: Path) -> int:
    """A descriptor of a file that is made, and must not be there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)


def read_at(fd: int, buffer: memoryview, start: int) -> int:
    """Read into `buffer` from byte `start`, from any thread. Returns how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], start)
    if hasattr(os, "pread"):
        data = os.pread(fd, len(buffer), start)
    else:
        with _seeking:
            os.lseek(fd, start, os.SEEK_SET)
            data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, data: memoryview, start: int) -> None:
    """Write all of `data` from byte `start` on, from any thread."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(fd, data, start)
        else:
            with _seeking:
                os.lseek(fd, start, os.SEEK_SET)
                count = os.write(fd, data)
        data, start = data[count:], start + count


def flush_data(fd: int) -> None:
    """Flush the bytes of a file to the disk; what is said about it may follow later."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    try:
        # Windows flushes only what may be written, and opens no folders.
        fd = os.open(path, (os.O_RDONLY if os.name == "posix" else os.O_RDWR) | _FLAGS)
    except PermissionError:
        if os.name == "posix":
            raise
        return
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems cannot sync a folder; their renames are as safe as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for this process: a descriptor that holds the lock until it is closed.

    None where this system has no such locks. Raises BlockingIOError if another process holds it,
    FileNotFoundError if the folder is gone.
    """
    if fcntl is None:
        return None
    fd = os.open(folder, os.O_RDONLY | _FLAGS)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # a network file system without locks
        os.close(fd)
        return None
    return fd


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system has no such step."""
    import ctypes  # only for the end of an overwrite

    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return False
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):  # Linux: AT_FDCWD is -100, RENAME_EXCHANGE 2
        failed = library.renameat2(-100, names[0], -100, names[1], 2)
    elif hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP is 2
        failed = library.renamex_np(*names, 2)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def rename_onto_empty(source: Path, target: Path) -> None:
    """Move a folder to a place where nothing is, or an empty folder."""
    if os.name != "posix":
        with suppress(FileNotFoundError):
            target.rmdir()
    os.rename(source, target)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and a polite kill wait until the block is over.

    Only the main thread is ever interrupted. What the signals did before, they do after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}
    for number in _SIGNALS:
        before[number] = signal.signal(number, lambda n, _frame: came.append(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by another program that embeds Python
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
