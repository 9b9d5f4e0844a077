"""Torch files that are written without torch: torch reads them, and so does loratool."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import CODES, random_of, raw_bytes, read_pickled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage import archive, archivewriting
from loratool.storage.archivewriting import Slot, directory, entry_header, slots
from loratool.storage.outgoing import Outgoing, copied
from loratool.storage.statedict import STORAGES
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.torchwriting import torch_layout, write_torch
from loratool.storage.values import read_raw

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

NARROW = ("F8_E4M3", "F8_E5M2")
WRITTEN = [d for d, code in CODES.items() if code in STORAGES.values() and code not in NARROW]


def outgoing(tensor: torch.Tensor, piece: int = 5) -> Outgoing:
    raw = np.frombuffer(raw_bytes(tensor), np.uint8)

    def read() -> Iterator[Bytes]:
        for low in range(0, len(raw), piece):
            yield raw[low : low + piece]

    return Outgoing(CODES[tensor.dtype], tuple(tensor.shape), read)


def with_outgoing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: with_outgoing(one) for key, one in value.items()}
    return outgoing(value) if isinstance(value, torch.Tensor) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape, one.stride()) == (
            other.dtype, other.shape, other.stride()
        ) and raw_bytes(one) == raw_bytes(other)  # fmt: skip
    return type(one) is type(other) and one == other


def check(path: Path, content: dict[str, Any]) -> None:
    """torch finds the content in it, mapped or not; it is whole, and as long as foretold."""
    layout = torch_layout(with_outgoing(content))
    path.unlink(missing_ok=True)
    write_torch(path, with_outgoing(content))
    assert path.stat().st_size == layout.size
    for mmap in (False, True):
        assert same(content, torch.load(path, weights_only=True, mmap=mmap))
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None  # the checksums are right
    assert all(slot.data % 64 == 0 for slot in layout.entries)


def test_every_dtype_is_written_as_torch_reads_it(tmp_path: Path) -> None:
    """All dtypes with a storage of their own, in several shapes, in one table."""
    shapes = [(3, 5), (7,), (), (0, 4), (1, 1, 2)]
    content = {f"{d}.{s}": random_of(d, *s) for d in WRITTEN for s in shapes}
    check(tmp_path / "x.pth", content)
    found, kind = read_pickled(tmp_path / "x.pth")
    assert kind == "dict"
    assert list(found) == list(content)
    for name, tensor in content.items():
        assert found[name].strides is None
        assert read_raw(found[name]).tobytes() == raw_bytes(tensor)


def test_tables_in_tables_and_plain_values_are_written(tmp_path: Path) -> None:
    """As litgpt and training scripts save them: a state dict beside numbers and texts."""
    content = {
        "model": {"a.lora_A": random_of(torch.bfloat16, 2, 3), "é": random_of(torch.float32, 1)},
        "alpha": 0.1, "r": 8, "low": -(1 << 31), "large": 1 << 31, "huge": -(1 << 70), "byte": 255,
        "name": "a\nb", "yes": True, "no": False, "nothing": None, "empty": {},
        "deep": {"a": {"b": 1}},
    }  # fmt: skip
    check(tmp_path / "x.pt", content)
    assert list(read_pickled(tmp_path / "x.pt")[0]) == ["a.lora_A", "é"]
    check(tmp_path / "x.pt", {})


def test_tensors_of_files_are_copied(tmp_path: Path) -> None:
    """What a torch file holds transposed is written in row-major order."""
    whole = random_of(torch.float16, 6, 4)
    torch.save({"t": whole.T, "w": whole}, tmp_path / "x.pt")
    found, _ = read_pickled(tmp_path / "x.pt")
    with FilePool() as files:
        content = {name: copied(info, files) for name, info in found.items()}
        write_torch(tmp_path / "y.pt", content)
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.equal(again["t"], whole.T)
    assert torch.equal(again["w"], whole)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """There is no date in it, and pieces of another size change nothing."""
    tensor = random_of(torch.float32, 9)
    for name, piece in (("x", 3), ("y", 36)):
        write_torch(tmp_path / name, {"w": outgoing(tensor, piece)})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_tensor_of_another_length_is_noticed(tmp_path: Path) -> None:
    """Bytes that are not those of the shape would shift what lies behind."""
    wrong = Outgoing("F32", (3,), lambda: [np.zeros(8, np.uint8)])
    with pytest.raises(ValueError, match="8 bytes"):
        write_torch(tmp_path / "x.pt", {"w": wrong})


def test_a_dtype_that_torch_would_not_read_is_refused() -> None:
    """torch reads 8-bit floats in another form, which no adapter is written in."""
    for dtype in NARROW:
        with pytest.raises(FileError, match=dtype):
            torch_layout({"w": Outgoing(dtype, (1,), list)})


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 80), 1 << 80), st.floats(allow_nan=False),
    st.text(max_size=5),
    st.builds(
        lambda dtype, shape: random_of(dtype, *shape),
        st.sampled_from(WRITTEN), st.lists(st.integers(0, 4), max_size=3),
    ),
)  # fmt: skip
TABLES = st.recursive(
    st.dictionaries(st.text(max_size=5), LEAVES, max_size=4),
    lambda inner: st.dictionaries(st.text(max_size=5), LEAVES | inner, max_size=3),
    max_leaves=6,
)


@settings(on_files, max_examples=40)
@given(content=TABLES)
def test_any_content_reads_back(tmp_path: Path, content: dict[str, Any]) -> None:
    """Any tables of any values are what torch loads."""
    check(tmp_path / "any.pt", content)


def test_archives_beyond_4_gb_have_64_bit_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sizes, places and counts do not fit, the wide fields are read by Python and by us."""
    monkeypatch.setattr(archivewriting, "_FULL", 300)
    monkeypatch.setattr(archive, "_ELSEWHERE", (0xFFFF, 300))
    contents = {"a": b"12345", "b": bytes(400), "c": b"x", "d": b""}
    found = slots([(name, len(one)) for name, one in contents.items()], 64)
    stream = io.BytesIO()
    for slot, one in zip(found, contents.values(), strict=True):
        stream.seek(slot.place)
        stream.write(entry_header(slot, 0) + one)
    stream.seek(found[-1].end)
    stream.write(directory(found, [0] * 4))
    header = entry_header(found[1], 0)
    assert struct.unpack_from("<2H2Q", header, 30 + len("b")) == (1, 16, 400, 400)
    whole = archive.Archive(stream, stream.tell())
    assert list(whole.entries) == ["d", "c", "b", "a"]
    for name, one in contents.items():
        cursor = whole.open(name)
        assert cursor.take(cursor.left) == one


def test_many_entries_are_counted_in_64_bits() -> None:
    """Python finds all of them beyond the end of 16 bits."""
    count = 0x10001
    found = [Slot(b"%d" % n, n * 100, n * 100 + 64, 36) for n in range(count)]
    raw = directory(found, [0] * count)
    stream = io.BytesIO(bytes(found[-1].end) + raw)
    assert len(zipfile.ZipFile(stream).namelist()) == count


def test_a_place_beyond_4_gb_is_found(tmp_path: Path) -> None:
    """A sparse file of five gigabytes: what lies behind them is read by torch and by us."""
    path = tmp_path / "x.pt"
    large = Outgoing("U8", (5 << 30,), lambda: [])
    layout = torch_layout({"large": large, "w": outgoing(torch.ones(3))})
    with path.open("wb") as file:
        for slot, one in zip(layout.entries, layout.held, strict=True):
            file.seek(slot.place)
            file.write(entry_header(slot, 0))
            for _, piece in one.pieces() if one is not large else ():
                file.write(piece.tobytes())
        file.seek(layout.entries[-1].end)
        file.write(directory(layout.entries, [0] * len(layout.entries)))
    assert read_raw(read_pickled(path)[0]["w"]).view(np.float32).tolist() == [1, 1, 1]
    assert torch.load(path, weights_only=True, mmap=True)["w"].tolist() == [1, 1, 1]


@pytest.mark.process
def test_torch_is_not_imported() -> None:
    """Writing is a matter of bytes."""
    code = "import sys, loratool.storage.torchwriting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
