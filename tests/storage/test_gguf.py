"""GGUF headers: what is well-formed is read as llama.cpp reads it, everything else is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.outcomes import assert_clear, file_error
from helpers.places import FIXTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError, TruncatedError
from loratool.storage.composed import view
from loratool.storage.folder import Folder
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32, read_raw, values_of
from loratool.storage.weights import Contents, read_contents

GOLDEN = FIXTURES / "containers"

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def read_gguf(path: Path) -> Contents:
    return read_contents(Folder(path.parent), path.name)


# --- files made by hand ---------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def item(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def tensor(
    name: str | bytes, dims: tuple[int, ...] = (3, 2), kind: int = 0, offset: int = 0
) -> bytes:
    axes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def head(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def whole(
    *tensors: bytes, values: tuple[bytes, ...] = (), data: bytes = bytes(24), version: int = 3,
    alignment: int = 32,
) -> bytes:  # fmt: skip
    start = head(len(tensors), len(values), version) + b"".join((*values, *tensors))
    return start + bytes(-len(start) % alignment) + data


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


SIX = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_made_by_hand_reads(tmp_path: Path, version: int) -> None:
    """The bytes of the cases below are right where nothing is broken in them."""
    content = whole(tensor("w"), data=SIX.tobytes(), version=version)
    found = read_gguf(written(tmp_path / "x.gguf", content))
    assert np.array_equal(read_float32(found.tensors["w"]), SIX.reshape(2, 3))
    assert (found.values, found.metadata, found.top) == ({}, {}, "dict")


def test_values_of_every_type_are_plain_python(tmp_path: Path) -> None:
    """All 13 types, and arrays in arrays, come out as numbers, truths, texts and lists."""
    values: dict[str, tuple[bytes, Any]] = {
        "u8": (item("u8", 0, b"\xff"), 255), "i8": (item("i8", 1, b"\xff"), -1),
        "u16": (item("u16", 2, b"\xff\xff"), 65535), "i16": (item("i16", 3, b"\xff\xff"), -1),
        "u32": (item("u32", 4, b"\xff" * 4), 2**32 - 1), "i32": (item("i32", 5, b"\xff" * 4), -1),
        "f32": (item("f32", 6, struct.pack("<f", 0.1)), float(np.float32(0.1))),
        "yes": (item("yes", 7, b"\1"), True), "no": (item("no", 7, b"\0"), False),
        "s": (item("s", 8, text("é\0")), "é\0"), "bad": (item("bad", 8, text(b"\xff")), "\ufffd"),
        "u64": (item("u64", 10, b"\xff" * 8), 2**64 - 1), "i64": (item("i64", 11, b"\xff" * 8), -1),
        "f64": (item("f64", 12, struct.pack("<d", 0.1)), 0.1),
        "list": (item("list", 9, array(5, 2, struct.pack("<ii", 7, -7))), [7, -7]),
        "names": (item("names", 9, array(8, 2, text("a") + text(""))), ["a", ""]),
        "none": (item("none", 9, array(4, 0, b"")), []),
        "deep": (
            item("deep", 9, array(9, 2, array(0, 1, b"\5") + array(7, 1, b"\1"))), [[5], [True]]
        ),
    }  # fmt: skip
    content = whole(values=tuple(raw for raw, _ in values.values()))
    found = read_gguf(written(tmp_path / "x.gguf", content)).values
    assert found == {key: value for key, (_, value) in values.items()}
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, (_, value) in values.items()
    }


def test_shapes_are_row_major_and_offsets_aligned(tmp_path: Path) -> None:
    """The last axis is written first; the data begins at a multiple of the file's alignment."""
    content = whole(
        tensor("w", (4, 3, 2)), tensor("v", (), offset=128), tensor("e", (0, 4), offset=256),
        values=(item("general.alignment", 4, struct.pack("<I", 128)),),
        data=np.arange(24, dtype=np.float32).tobytes().ljust(128, b"\0") + SIX[1:2].tobytes(),
        alignment=128,
    )  # fmt: skip
    found = read_gguf(written(tmp_path / "x.gguf", content)).tensors
    assert [(i.name, i.shape, i.start) for i in found.values()] == [
        ("w", (2, 3, 4), 256), ("v", (), 384), ("e", (4, 0), 512)
    ]  # fmt: skip
    assert np.array_equal(read_float32(found["w"]).reshape(-1), np.arange(24))
    assert read_float32(found["v"]) == 1
    assert read_float32(found["e"]).shape == (4, 0)


PLAIN = {
    0: ("F32", "<f4"), 1: ("F16", "<f2"), 24: ("I8", "i1"), 25: ("I16", "<i2"), 26: ("I32", "<i4"),
    27: ("I64", "<i8"), 28: ("F64", "<f8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_have_their_bytes(tmp_path: Path, kind: int) -> None:
    """Floats and integers are read as they lie in the file."""
    dtype, form = PLAIN[kind]
    values = np.arange(6).astype(form)
    content = whole(tensor("w", kind=kind), data=values.tobytes())
    info = read_gguf(written(tmp_path / "x.gguf", content)).tensors["w"]
    assert info.dtype == dtype
    assert read_raw(info).tobytes() == values.tobytes()


def test_bfloat16_has_its_values(tmp_path: Path) -> None:
    """The upper halves of float32."""
    raw = (SIX.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    content = whole(tensor("w", kind=30), data=raw)
    info = read_gguf(written(tmp_path / "x.gguf", content)).tensors["w"]
    assert np.array_equal(read_float32(info), SIX.reshape(2, 3))


# --- blocks ---------------------------------------------------------------------------------------


def blocks_of(seed: int, rows: int, columns: int) -> tuple[bytes, np.ndarray]:
    """Q8_0 data with random scales and codes, and the values that it stands for."""
    rng = np.random.default_rng(seed)
    count = rows * columns // 32
    scales = rng.standard_normal(count).astype(np.float16)
    codes = rng.integers(-128, 128, (count, 32)).astype(np.int8)
    raw = b"".join(s.tobytes() + c.tobytes() for s, c in zip(scales, codes, strict=True))
    values = scales.astype(np.float64)[:, None] * codes.astype(np.float64)
    return raw, values.reshape(rows, columns)


def test_q8_0_is_decoded_exactly(tmp_path: Path) -> None:
    """Whole, by any range across blocks, transposed and cut, it is scale times code."""
    raw, wanted = blocks_of(1, 3, 64)
    content = whole(tensor("w", (64, 3), 8), data=raw)
    info = read_gguf(written(tmp_path / "x.gguf", content)).tensors["w"]
    assert (info.dtype, info.shape, info.disk_bytes) == ("F32", (3, 64), len(raw))
    assert np.array_equal(read_float32(info).astype(np.float64), wanted)
    flat = wanted.reshape(-1)
    with FilePool() as files:
        values = values_of(info, files)
        for low, high in ((0, 1), (31, 33), (5, 5), (40, 131), (191, 192), (64, 128)):
            assert np.array_equal(values.floats(low, high), flat[low:high]), (low, high)
    turned = view(info, (64, 3), 0, (1, 64))
    assert np.array_equal(read_float32(turned), wanted.T)
    assert np.array_equal(read_float32(view(info, (2, 64), 64, None)), wanted[1:])


@pytest.mark.parametrize(("kind", "name", "nbytes"), [(2, "Q4_0", 18), (12, "Q4_K", 144)])
def test_other_blocks_are_refused_where_they_are_read(
    tmp_path: Path, kind: int, name: str, nbytes: int
) -> None:
    """Names and shapes of a quantised file can be shown; its values are refused by their type."""
    columns = 32 if kind < 10 else 256
    content = whole(tensor("w", (columns, 1), kind), data=bytes(nbytes))
    path = written(tmp_path / "x.gguf", content)
    info = read_gguf(path).tensors["w"]
    assert (info.shape, info.disk_bytes) == ((1, columns), nbytes)
    with pytest.raises(FileError) as caught:
        read_float32(info)
    assert_clear(caught.value, str(path), "'w'", name)


# --- files of gguf's own package ------------------------------------------------------------------


def test_what_gguf_writes_is_read_as_it_reads_it() -> None:
    """Every type of value and of tensor, as llama.cpp's own package wrote and decoded them."""
    found = read_gguf(GOLDEN / "types.gguf")
    assert found.values == {
        "general.architecture": "llama", "general.alignment": 64, "a.uint8": 255, "a.int8": -1,
        "a.uint16": 65535, "a.int16": -1, "a.uint32": 2**32 - 1, "a.int32": -1,
        "a.uint64": 2**64 - 1, "a.int64": -1, "a.float32": float(np.float32(0.1)), "a.float64": 0.1,
        "a.bool": True, "a.string": "é", "a.array": ["a", "bc", "é"], "floats": [0.5, -2.0],
        "ints": [1, -1], "truths": [True, False],
    }  # fmt: skip
    wanted = np.load(GOLDEN / "types.npz")
    assert found.tensors.keys() == {*wanted, "Q4_0"}
    for name, values in wanted.items():
        info = found.tensors[name]
        assert info.shape == values.shape
        assert info.start % 64 == 0
        if info.is_float and info.dtype != "F64":
            assert read_float32(info).tobytes() == values.tobytes(), name
        else:
            assert read_raw(info).tobytes() == values.tobytes(), name
    with pytest.raises(FileError, match="Q4_0"):
        read_float32(found.tensors["Q4_0"])


# --- what is refused ------------------------------------------------------------------------------

HUGE = 1 << 60
ALIGN = "general.alignment"


def strings(depth: int) -> bytes:
    """Arrays inside each other."""
    raw = array(0, 1, b"\1")
    for _ in range(depth):
        raw = array(9, 1, raw)
    return raw


REFUSED = {
    "version-1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
    "version-0": (head(0, 0, 0), "version 0"),
    "version-4": (head(0, 0, 4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only-magic": (b"GGUF", "ends too early"),
    "no-counts": (b"GGUF\3\0\0\0", "ends too early"),
    "tensors-huge": (head(HUGE, 0), "more than 600,000 tensors"),
    "tensors-most": (head(2**64 - 1, 0), "more than 600,000 tensors"),
    "values-huge": (head(0, HUGE) + bytes(99), "more than 100,000 values"),
    "tensors-too-many": (head(2, 0) + tensor("w"), "ends too early"),
    "key-huge": (head(0, 1) + struct.pack("<Q", HUGE) + bytes(99), "too long"),
    "key-too-long": (head(0, 1) + item("k" * 5000, 0, b"\1"), "too long"),
    "key-cut": (head(0, 1) + struct.pack("<Q", 50) + bytes(9), "50 bytes where 9"),
    "key-not-utf8": (whole(values=(item(b"\xff", 0, b"\1"),)), "not UTF-8"),
    "key-twice": (whole(values=(item("k", 0, b"\1"),) * 2), "the key 'k' twice"),
    "value-unknown": (whole(values=(item("k", 13, b"\1"),)), "unknown type 13"),
    "truth": (whole(values=(item("k", 7, b"\2"),)), "neither 0 nor 1"),
    "string-huge": (head(0, 1) + item("k", 8, struct.pack("<Q", HUGE)), "ends too early"),
    "string-beyond": (head(0, 1) + item("k", 8, struct.pack("<Q", 99) + b"x"), "99 bytes where 1"),
    "array-huge": (head(0, 1) + item("k", 9, array(0, HUGE, bytes(9))), "elements"),
    "array-long": (head(0, 1) + item("k", 9, array(12, 9999, bytes(9))), "79,992 bytes where 9"),
    "array-of-texts": (head(0, 1) + item("k", 9, array(8, 9999, bytes(16))), "ends too early"),
    "arrays-empty": (
        head(0, 1) + item("k", 9, array(9, 1_999_990, array(9, 20, b"") * 9)), "elements"
    ),
    "array-unknown": (whole(values=(item("k", 9, array(99, 1, b"\1")),)), "unknown type 99"),
    "array-unknown-empty": (whole(values=(item("k", 9, array(99, 0, b"")),)), "unknown type 99"),
    "arrays-deep": (whole(values=(item("k", 9, strings(4)),)), "too deep"),
    "arrays-very-deep": (whole(values=(item("k", 9, strings(50_000)),)), "too deep"),
    "alignment-0": (whole(tensor("w"), values=(item(ALIGN, 4, bytes(4)),)), "power of two"),
    "alignment-48": (whole(tensor("w"), values=(item(ALIGN, 4, b"\x30\0\0\0"),)), "power of two"),
    "alignment-text": (whole(tensor("w"), values=(item(ALIGN, 8, text("x")),)), "power of two"),
    "alignment-true": (whole(tensor("w"), values=(item(ALIGN, 7, b"\1"),)), "power of two"),
    "name-twice": (whole(tensor("w"), tensor("w", offset=32), data=bytes(99)), "called 'w'"),
    "name-not-utf8": (whole(tensor(b"\xff")), "not UTF-8"),
    "axes": (whole(tensor("w", (1,) * 65)), "65 axes"),
    "axes-huge": (head(1, 0) + text("w") + b"\xff" * 4 + bytes(99), "4,294,967,295 axes"),
    "shape-huge": (whole(tensor("w", (HUGE, HUGE))), "impossible shape"),
    "shape-huge-and-0": (whole(tensor("w", (HUGE, HUGE, 0))), "impossible shape"),
    "type-unknown": (whole(tensor("w", kind=4)), "type number 4"),
    "blocks-odd": (whole(tensor("w", (33, 2), 8)), "no whole blocks"),
    "blocks-of-a-scalar": (whole(tensor("w", (), 8)), "no whole blocks"),
    "offset-odd": (whole(tensor("w", offset=4), data=bytes(99)), "no multiple of 32"),
    "overlap": (whole(tensor("v", (9,)), tensor("w", offset=32), data=bytes(99)), "overlaps"),
    "same-place": (whole(tensor("v"), tensor("w"), data=bytes(99)), "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_header_is_refused(tmp_path: Path, case: str) -> None:
    """However a header is wrong, it is one clear FileError, at once."""
    content, words = REFUSED[case]
    error = file_error(read_gguf, written(tmp_path / "x.gguf", content))
    assert words in error.message


BEYOND = {
    "one-byte": whole(tensor("w"), data=bytes(23)),
    "offset-huge": whole(tensor("w", offset=HUGE)),
    "offset-most": whole(tensor("w", offset=2**64 - 32)),
    "shape": whole(tensor("w", (1 << 40,))),
    "blocks": whole(tensor("w", (64, 1), 8), data=bytes(67)),
    "no-data": whole(tensor("w"), data=b""),
    "alignment": whole(tensor("w"), values=(item(ALIGN, 4, struct.pack("<I", 1 << 31)),)),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_tensor_beyond_the_file_is_refused(tmp_path: Path, case: str) -> None:
    """A file that ends before its tensors do is truncated."""
    error = file_error(read_gguf, written(tmp_path / "x.gguf", BEYOND[case]), "truncated")
    assert isinstance(error, TruncatedError)


def test_the_magic_decides_and_the_ending_must_fit(tmp_path: Path) -> None:
    """A GGUF file by any name is one; a file called so that is none is refused in these words."""
    content = whole(tensor("w"), data=SIX.tobytes())
    for name in ("x.bin", "x.safetensors", "adapter", "x.npz"):
        found = read_gguf(written(tmp_path / name, content))
        assert np.array_equal(read_float32(found.tensors["w"]), SIX.reshape(2, 3))
    for other in (b"PK\3\4" + bytes(99), b"", b"GGU"):
        file_error(read_gguf, written(tmp_path / "y.gguf", other))


SAMPLE = whole(
    tensor("a", (32, 1), 8), tensor("b", offset=64), tensor("c", (4,), 30, offset=96),
    values=(
        item("general.architecture", 8, text("llama")), item("n", 9, array(4, 2, bytes(8))),
        item("adapter.lora.alpha", 6, struct.pack("<f", 16.0)),
    ),
    data=bytes(range(104)),
)  # fmt: skip


@settings(on_files, max_examples=500)
@given(
    at=st.integers(0, len(SAMPLE) - 1),
    new=st.binary(max_size=9),
    gone=st.integers(0, 9),
)
def test_any_damage_is_refused_or_harmless(tmp_path: Path, at: int, new: bytes, gone: int) -> None:
    """Bytes changed, added or lost are a FileError, or the tensors still lie inside the file."""
    path = written(tmp_path / "damaged.gguf", SAMPLE[:at] + new + SAMPLE[at + gone :])
    try:
        for info in read_gguf(path).tensors.values():
            assert len(read_raw(info)) == info.nbytes
    except FileError as error:
        assert_clear(error, str(path))
