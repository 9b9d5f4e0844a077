"""What operating systems do differently, with and without the names that only POSIX has."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.places import ROOT

from loratool.storage import system
from loratool.storage.destination import explain


def take_away(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    for name in names:
        monkeypatch.delattr(os, name, raising=False)


@pytest.mark.parametrize(
    "missing", [[], ["preadv"], ["preadv", "pread", "pwrite"]], ids=["posix", "pread", "seek"]
)
def test_reads_and_writes_by_position_from_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    """Every byte lands where it belongs and comes from there, whatever the others do."""
    take_away(monkeypatch, missing)
    fd = system.open_new(tmp_path / "x")
    pieces = [bytes([i]) * (1000 + i) for i in range(60)]
    starts = [sum(map(len, pieces[:i])) for i in range(60)]

    def write(i: int) -> None:
        system.write_at(fd, memoryview(pieces[i]), starts[i])

    def read(i: int) -> bytes:
        buffer = bytearray(len(pieces[i]))
        done = 0
        while count := system.read_at(fd, memoryview(buffer)[done:], starts[i] + done):
            done += count
        return bytes(buffer[:done])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, reversed(range(60))))
        assert list(pool.map(read, range(60))) == pieces
    assert system.read_at(fd, memoryview(bytearray(4)), 1 << 40) == 0
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)
    with pytest.raises(FileExistsError):
        system.open_new(tmp_path / "x")


def test_two_folders_change_places(tmp_path: Path) -> None:
    """In one step, or not at all where the system has no such step."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    if system.exchange(one, other):
        assert os.listdir(one) == ["other"]
        assert os.listdir(other) == ["one"]
    else:
        assert os.listdir(one) == ["one"]
        assert os.listdir(other) == ["other"]


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    """A place that is gone is no lack of the system."""
    (tmp_path / "one").mkdir()
    if system.exchange(tmp_path / "one", tmp_path / "one"):
        with pytest.raises(OSError, match="none"):
            system.exchange(tmp_path / "one", tmp_path / "none")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_until_a_block_is_over(number: int) -> None:
    """A signal inside of the block is heard right after it, by who heard it before."""
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("signal"))
    try:
        with system.uninterrupted():
            signal.raise_signal(number)
            heard.append("block")
        assert heard == ["block", "signal"]
    finally:
        signal.signal(number, before)


def test_a_block_in_another_thread_changes_no_signals() -> None:
    """Only the main thread may set them, and only it is interrupted."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def block() -> None:
        with system.uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "folder"])
def test_files_and_folders_are_flushed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Both go through the same call, and what is not there is an error."""
    make(tmp_path / "x")
    system.sync(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        system.sync(tmp_path / "none")


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_flush_that_fails_is_an_error_but_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that cannot flush folders say EINVAL or ENOTSUP; a broken disk says EIO."""
    for number in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", failing(number))
        system.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        system.sync(tmp_path)
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        system.sync(tmp_path)


def test_a_file_system_without_locks_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse every lock; a run goes on without."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert system.lock_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EEXIST, "not a folder"), (errno.ENOTDIR, "not a folder"), (errno.EFBIG, "ulimit -f"),
     (errno.EDQUOT, "disk is full"), (errno.EROFS, "not allowed"), (errno.EIO, "writing failed")],
)  # fmt: skip
def test_what_stops_a_write_is_said_in_words(tmp_path: Path, number: int, words: str) -> None:
    """Each with what can be done about it."""
    error = explain(OSError(number, os.strerror(number)), tmp_path / "out")
    assert words in error.message + error.hint
    assert error.hint


@pytest.mark.long
@pytest.mark.process
def test_outputs_and_values_without_the_names_of_posix() -> None:
    """The tests of outputs and of values pass where neither positions, nor locks, nor exchanges of
    folders are to be had. What needs a lock is left out: it is said in `storage.system`."""
    files = ["staging/test_existing_outputs.py", "test_values.py", "test_system.py"]
    command = [
        sys.executable, "tests/helpers/portable.py", "-n", "0", "-k", "not without_the_names",
        *(f"tests/storage/{name}" for name in files),
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
