"""A log of results: what was put is found again, by others too, and nothing that is not whole."""

from __future__ import annotations

import math
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.processes import start_python
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.streams.results import Result, ResultLog

Record = tuple[str, dict[str, Any], list[bytes]]

FACTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)
RECORDS = st.lists(
    st.tuples(st.text(max_size=8), FACTS, st.lists(st.binary(max_size=40), max_size=3)),
    max_size=5,
    unique_by=lambda record: record[0],
)
THREE: list[Record] = [
    ("one", {"x": 0.1}, [b"first", b""]), ("two", {}, []), ("three", {"n": [1]}, [bytes(300)]),
]  # fmt: skip


def put(log: ResultLog, record: Record) -> Result:
    key, facts, pieces = record
    return log.put(key, facts, [np.frombuffer(piece, np.uint8) for piece in pieces])


def written(folder: Path, records: list[Record]) -> tuple[Path, list[int]]:
    """The log file of a process that put these and ended, and its length after each."""
    ends = [0]
    with ResultLog(folder) as log:
        for record in records:
            put(log, record)
            (path,) = folder.iterdir()
            ends.append(path.stat().st_size)
    return path, ends


def bytes_of(result: Result) -> list[bytes]:
    found = []
    for piece in result.pieces:
        target = bytearray(piece.nbytes)
        piece.read_into(memoryview(target))
        found.append(bytes(target))
    return found


def found(folder: Path, keys: list[str]) -> list[str]:
    """Which of the keys a process that opens the folder now finds."""
    with ResultLog(folder) as log:
        return [key for key in keys if log.get(key) is not None]


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that Python held at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, NaN and the sign of zero too."""
    if isinstance(one, float):
        return isinstance(other, float) and (
            (math.isnan(one) and math.isnan(other))
            or (one, math.copysign(1, one)) == (other, math.copysign(1, other))
        )  # fmt: skip
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(RECORDS)
@settings(max_examples=60, deadline=None)
def test_what_is_put_is_found(tmp_path_factory: pytest.TempPathFactory, records: Any) -> None:
    """Keys, facts and bytes come back exactly, in the process that put them and in the next."""
    folder = tmp_path_factory.mktemp("log")
    with ResultLog(folder) as log:
        for record in records:
            assert bytes_of(put(log, record)) == record[2]
        with ResultLog(folder) as other:
            for key, facts, pieces in records:
                for reader in (log, other):
                    result = reader.get(key)
                    assert result is not None
                    assert result.facts.keys() == facts.keys()
                    assert all(same(facts[name], result.facts[name]) for name in facts)
                    assert bytes_of(result) == pieces
            assert other.get("a key that nobody has put") is None


def test_a_log_that_ends_anywhere_has_the_records_that_are_whole(tmp_path: Path) -> None:
    """Cut at each of its bytes, a log gives those records whose last byte is there, no others."""
    path, ends = written(tmp_path / "log", THREE)
    keys, data = [key for key, _, _ in THREE], path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        assert found(path.parent, keys) == keys[: sum(end <= length for end in ends[1:])]


def test_a_changed_byte_takes_its_record_and_what_follows(tmp_path: Path) -> None:
    """With any one byte changed, the records before it are found, and none is taken up wrongly."""
    path, ends = written(tmp_path / "log", THREE)
    keys, data = [key for key, _, _ in THREE], path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert found(path.parent, keys) == keys[: sum(end <= place for end in ends[1:])]


@pytest.mark.parametrize("length", [b"\xff" * 4 + b"\0" * 8, b"\0" * 4 + b"\xff" * 8, b"\xff" * 12])
def test_an_announced_length_is_not_believed(tmp_path: Path, length: bytes) -> None:
    """Lengths of exabytes allocate nothing, also where the file is as long."""
    path, _ = written(tmp_path / "log", THREE)
    path.write_bytes(path.read_bytes() + b"loraRES1" + length + bytes(100))
    os.truncate(path, 5 << 30)  # a hole: it takes no room
    assert peak_of(lambda: found(path.parent, ["one"])) < 40 << 20
    assert found(path.parent, ["one", "two", "three"]) == ["one", "two", "three"]


def test_data_is_not_held(tmp_path: Path) -> None:
    """A large piece is in the memory neither of who looks at the log nor of who reads from it."""
    written(tmp_path / "log", [("large", {}, [bytes(64 << 20)])])

    def read() -> None:
        with ResultLog(tmp_path / "log") as log:
            result = log.get("large")
            assert result is not None
            result.pieces[0].read_into(memoryview(bytearray(10)), (64 << 20) - 10)

    assert peak_of(read) < 8 << 20


def test_pieces_are_read_by_range(tmp_path: Path) -> None:
    """A range of one piece is of that piece, and what is beyond its end is refused."""
    with ResultLog(tmp_path / "log") as log:
        _, piece, _ = put(log, ("key", {}, [b"before", b"0123456789", b"after"])).pieces
        target = bytearray(4)
        piece.read_into(memoryview(target), 6)
        assert target == b"6789"
        with pytest.raises(ValueError, match="10 bytes end before 11"):
            piece.read_into(memoryview(target), 7)


def test_refresh_finds_what_others_put_since(tmp_path: Path) -> None:
    """Another's results are found after a refresh, though its log ended half-way before."""
    folder = tmp_path / "log"
    path, ends = written(folder, THREE)
    data = path.read_bytes()
    path.write_bytes(data[: ends[2] - 1])
    with ResultLog(folder) as log:
        assert log.get("one")
        assert log.get("two") is None
        path.write_bytes(data)
        assert log.get("two") is None
        log.refresh()
        result = log.get("three")
        assert result is not None
        assert bytes_of(result) == [bytes(300)]


def test_refresh_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been looked at is not read again, else waiting for others would read all of it."""
    import loratool.streams.results as results

    written(tmp_path / "log", THREE)
    with ResultLog(tmp_path / "log") as log:
        monkeypatch.setattr(results, "_record", None)
        log.refresh()
        assert log.get("one")


def test_a_process_does_not_write_into_the_log_of_another(tmp_path: Path) -> None:
    """Every opened log has a file of its own, so that half a record at an end stays the last."""
    path, ends = written(tmp_path / "log", THREE)
    os.truncate(path, ends[2] + 5)
    before = path.read_bytes()
    with ResultLog(tmp_path / "log") as log:
        put(log, THREE[2])
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
    assert found(path.parent, ["one", "two", "three"]) == ["one", "two", "three"]


def test_a_write_that_failed_is_gone_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full disk the next result lies where the half-written one began."""
    import loratool.streams.results as results

    whole, calls = results.write_at, 0

    def failing(descriptor: int, data: memoryview, position: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            whole(descriptor, data[:100], position)
            raise OSError(28, "full")
        whole(descriptor, data, position)

    with ResultLog(tmp_path / "log") as log:
        put(log, THREE[0])
        calls = 0
        monkeypatch.setattr(results, "write_at", failing)
        with pytest.raises(OSError, match="full"):
            put(log, THREE[2])
        assert log.get("three") is None
        for record in (THREE[1], ("four", {}, [b"4"])):
            put(log, record)
        result = log.get("four")
        assert result is not None
        assert bytes_of(result) == [b"4"]
    assert found(tmp_path / "log", ["one", "two", "three", "four"]) == ["one", "two", "four"]


def test_threads_put_at_once(tmp_path: Path) -> None:
    """Results of several threads lie one after the other, each whole."""
    names = [[f"{thread}-{number}" for number in range(40)] for thread in range(4)]
    with ResultLog(tmp_path / "log") as log:
        threads = [
            threading.Thread(
                target=lambda own=own: [put(log, (n, {}, [n.encode() * 50, b"."])) for n in own]
            )
            for own in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with ResultLog(tmp_path / "log") as log:
        for name in (name for own in names for name in own):
            result = log.get(name)
            assert result is not None
            assert bytes_of(result) == [name.encode() * 50, b"."]


def test_a_closed_log_makes_no_files(tmp_path: Path) -> None:
    """A thread that is late after an error does not bring a removed folder back."""
    log = ResultLog(tmp_path / "log")
    log.close()
    with pytest.raises(ValueError, match="closed"):
        put(log, THREE[0])
    assert not (tmp_path / "log").exists()


def test_more_logs_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of more processes than files may be open are read all the same."""
    import loratool.streams.results as results

    monkeypatch.setattr(results, "_MOST_OPEN", 2)
    for number in range(5):
        with ResultLog(tmp_path / "log") as log:
            put(log, (f"{number}", {"n": number}, [b"%d" % number]))
    with ResultLog(tmp_path / "log") as log:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            result = log.get(f"{number}")
            assert result is not None
            assert (result.facts, bytes_of(result)) == ({"n": number}, [b"%d" % number])
        assert len(os.listdir("/proc/self/fd")) == before + 2


def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    """Other files, folders, pipes and links in the folder are neither read nor waited for."""
    path, _ = written(tmp_path / "log", THREE)
    (path.parent / "other.txt").write_text("mine")
    (path.parent / "folder.log").mkdir()
    os.mkfifo(path.parent / "pipe.log")
    (path.parent / "gone.log").symlink_to("nowhere")
    (path.parent / "empty.log").touch()
    assert found(path.parent, ["one", "two", "three"]) == ["one", "two", "three"]


_CHILD = """
import sys
from pathlib import Path
import numpy as np
from loratool.streams.results import ResultLog
log = ResultLog(Path(sys.argv[1]))
for number in range(10**6):
    log.put(str(number), {"n": number}, [np.full(5000, number % 251, np.uint8)])
    if number == 20: print("there", flush=True)
"""


@pytest.mark.process
def test_a_killed_process_leaves_what_it_put(tmp_path: Path) -> None:
    """After SIGKILL in the middle of writing, the results so far are found, each whole."""
    process: subprocess.Popen[str] = start_python(_CHILD, str(tmp_path / "log"))
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n", process.communicate()
    process.kill()
    process.communicate(timeout=10)
    with ResultLog(tmp_path / "log") as log:
        number = 0
        while (result := log.get(str(number))) is not None:
            assert (result.facts, bytes_of(result)) == (
                {"n": number},
                [bytes([number % 251]) * 5000],
            )
            number += 1
    assert number > 20
