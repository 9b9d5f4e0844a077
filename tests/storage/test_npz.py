"""Files of NumPy arrays: read as NumPy reads them, without unpickling anything."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.outcomes import assert_clear, file_error
from helpers.places import FIXTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage.folder import Folder
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import read_float32, read_raw
from loratool.storage.weights import read_contents

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

DTYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "i1": "I8", "i2": "I16", "i4": "I32",
    "i8": "I64", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "b1": "BOOL",
}  # fmt: skip


def read_npz(path: Path) -> dict[str, TensorInfo]:
    return read_contents(Folder(path.parent), path.name).tensors


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    """The bytes of an array with this header, right or wrong."""
    text = header if isinstance(header, bytes) else header.encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY%c\0" % version + len(text).to_bytes(width, "little") + text + data


def zip_of(path: Path, method: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


def plain(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


DATA = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_like_numpy(tmp_path: Path, dtype: str) -> None:
    """Plain dtypes, in several shapes and both orders, have NumPy's dtype, shape and bytes."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (), (0, 4), (2, 3, 4), (1, 6), (6, 1)]
    arrays = {
        f"{order}.{number}": np.asarray(rng.integers(0, 90, shape), dtype, order=order)
        for order in ("C", "F")
        for number, shape in enumerate(shapes)
    }
    found = read_npz(save(tmp_path / "x.npz", **arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        info = found[name]
        assert (info.name, info.dtype, info.shape) == (name, DTYPES[dtype], array.shape)
        assert read_raw(info).tobytes() == array.tobytes("C"), name


def test_columns_first_is_a_view_by_strides(tmp_path: Path) -> None:
    """A transposed array lies in the file column by column, and is read row by row."""
    wide = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    info = read_npz(save(tmp_path / "x.npz", w=wide.T))["w"]
    assert info.strides == (1, 4, 12)
    assert np.array_equal(read_float32(info), wide.T)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (1, 6, 1), (0, 4), ()])
def test_an_order_that_says_nothing_makes_no_view(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """MLX calls vectors columns first; they lie as any other, and are read by range."""
    data = DATA[: int(np.prod(shape))]
    content = npy(plain(order="True", shape=str(shape)), data.tobytes())
    info = read_npz(zip_of(tmp_path / "x.npz", w=content))["w"]
    assert (info.shape, info.strides) == (shape, None)
    assert np.array_equal(read_float32(info), data.reshape(shape))


def test_two_raw_bytes_are_bfloat16(tmp_path: Path) -> None:
    """MLX writes bfloat16 as "<V2", by its own words, and NumPy writes that again as "|V2"."""
    values = np.array([1.0, -2.5, 3.0], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    # As mlx 0.32.4 wrote it: a header that is not padded to 64, and a tuple that ends in ", ".
    mlx = npy("{'descr': '<V2', 'fortran_order': True, 'shape': (3, )}    \n", raw)
    path = zip_of(tmp_path / "x.npz", w=mlx)
    again = save(tmp_path / "y.npz", **dict(np.load(path)))
    for file in (path, again):
        info = read_npz(file)["w"]
        assert (info.dtype, info.shape, info.strides) == ("BF16", (3,), None)
        assert np.array_equal(read_float32(info), values)


def test_what_mlx_writes_is_read() -> None:
    """A file of MLX's own: four dtypes, and matrices that it left lying column by column."""
    found = read_npz(FIXTURES / "containers/mlx.npz")
    values = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
    for name, wanted in {"lora_a": values, "lora_b": values.T, "m": values[0]}.items():
        for dtype, code in {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.items():
            info = found[f"{dtype}.{name}"]
            assert info.dtype == code
            assert np.array_equal(read_float32(info), wanted)
        info = found[f"int32.{name}"]
        assert info.dtype == "I32"
        assert read_raw(info).tobytes() == wanted.astype("<i4").tobytes()
    assert found["float32.lora_b"].strides == (1, 3)
    assert read_float32(found["scalar"]) == np.float32(0.5)
    assert len(found) == 13


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_reads(tmp_path: Path, version: int) -> None:
    """The three versions of the header differ in the width of its length."""
    content = npy(plain(), DATA.tobytes(), version)
    assert np.array_equal(np.load(io.BytesIO(content)), DATA.reshape(2, 3))
    info = read_npz(zip_of(tmp_path / "x.npz", w=content))["w"]
    assert np.array_equal(read_float32(info), DATA.reshape(2, 3))


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}",
        '{"descr":"<f4","fortran_order":False,"shape":(2,3,)}',
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }",
    ],
)
def test_other_ways_to_write_a_header_read(tmp_path: Path, header: str) -> None:
    """Readers must not rely on the order of the fields; Python 2 wrote 2L."""
    info = read_npz(zip_of(tmp_path / "x.npz", w=npy(header, DATA.tobytes())))["w"]
    assert np.array_equal(read_float32(info), DATA.reshape(2, 3))


REFUSED = {
    "objects": (npy(plain("'|O'", shape="(1,)"), b"\x80\x04N."), "Python objects"),
    "big-endian": (npy(plain("'>f4'"), DATA.tobytes()), "big-endian"),
    "text": (npy(plain("'<U3'", shape="(2,)"), bytes(24)), "'<U3'"),
    "longdouble": (npy(plain("'<f16'", shape="(1,)"), bytes(16)), "'<f16'"),
    "raw-of-4": (npy(plain("'|V4'"), bytes(24)), "'|V4'"),
    "fields": (npy(plain("[('a', '<f4'), ('b', '|O')]"), bytes(24)), "objects"),
    "more-data": (npy(plain(), bytes(28)), "28 bytes of data and should have 24"),
    "less-data": (npy(plain(), bytes(20)), "should have 24"),
    "no-magic": (b"\x92NUMPY" + npy(plain(), bytes(24))[6:], "does not begin"),
    "version": (npy(plain(), bytes(24), 4), "version 4"),
    "too-long": (npy(plain() + " " * 10_000, bytes(24)), "a header of 10,0"),
    "huge-header": (npy(plain(), version=2)[:8] + b"\xff" * 4, "4,294,967,295"),
    "cut-header": (npy(plain())[:30], "announces"),
    "empty": (b"", "ends too early"),
    "no-table": (npy("[1, 2]", bytes(24)), "damaged header"),
    "no-end": (npy(plain().replace("}", ""), bytes(24)), "damaged header"),
    "more-behind": (npy(plain().strip() + " {}", bytes(24)), "damaged header"),
    "only-a-brace": (npy("{", bytes(24)), "damaged header"),
    "field-twice": (npy(plain().replace("}", "'descr': '<f4'}"), bytes(24)), "damaged header"),
    "shape-missing": (npy("{'descr': '<f4', 'fortran_order': False, }", b""), "what it is"),
    "negative": (npy(plain(shape="(-2, -3)"), bytes(24)), "damaged header"),
    "no-tuple": (npy(plain(shape="(6)"), bytes(24)), "damaged header"),
    "holes": (npy(plain(shape="(2,,3)"), bytes(24)), "damaged header"),
    "called": (npy(plain(shape="(2, print())"), bytes(24)), "damaged header"),
    "huge": (npy(plain(shape="(9223372036854775807, 0, 4)")), "impossible shape"),
    "huge-digits": (npy(plain(shape=f"({'9' * 5000},)")), "damaged header"),
    "axes": (npy(plain(shape="(" + "1," * 65 + ")"), bytes(4)), "impossible shape"),
    "order-is-a-number": (npy(plain(order="0"), bytes(24)), "damaged header"),
    "order-is-a-text": (npy(plain(order="'False'"), bytes(24)), "what it is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_array_that_is_no_plain_one_is_refused(tmp_path: Path, case: str) -> None:
    """Whatever is wrong with one array is a FileError that names it, before any data is read."""
    content, words = REFUSED[case]
    path = zip_of(tmp_path / "x.npz", good=npy(plain(), DATA.tobytes()), wrong=content)
    error = file_error(read_npz, path)
    assert words in error.message


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    """What savez_compressed wrote cannot be read by range, and is refused in these words."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, w=DATA)
    error = file_error(read_npz, path, "compressed", "'w'")
    assert "numpy.savez" in error.hint


def test_other_files_of_that_name_are_refused(tmp_path: Path) -> None:
    """Other entries, no zip archive, an empty file: one clear error each, by what it is."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"x")
    file_error(read_npz, path, "readme.txt")
    for content, words in ((b"", "empty"), (b"\x93NUMPY", "single NumPy"), (b"x" * 99, "a text"),
                           (b"\1" * 99, "damaged")):  # fmt: skip
        path.write_bytes(content)
        file_error(read_npz, path, words)


@on_files
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    columns=st.booleans(),
    name=st.text("ab./é_0", min_size=1, max_size=9).filter(lambda n: not n.startswith("/")),
)
def test_any_array_reads_back(
    tmp_path: Path, shape: list[int], dtype: str, columns: bool, name: str
) -> None:
    """Any shape, order and name that savez writes comes back."""
    count = int(np.prod(shape))
    array = np.arange(count).astype(dtype).reshape(shape, order="F" if columns else "C")
    path = tmp_path / "any.npz"
    with zipfile.ZipFile(path, "w") as archive:
        stream = io.BytesIO()
        np.save(stream, array)
        archive.writestr(f"{name}.npy", stream.getvalue())
    (info,) = read_npz(path).values()
    assert (info.name, info.shape) == (name, array.shape)
    assert read_raw(info).tobytes() == array.tobytes("C")


def sample() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=DATA, b=np.arange(6.0).reshape(2, 3).T)
    return stream.getvalue()


SAMPLE = sample()


@settings(on_files, max_examples=300)
@given(at=st.integers(0, len(SAMPLE) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, at: int, bit: int, cut: bool) -> None:
    """A flipped bit or a lost byte is a FileError, or the arrays still lie inside the file."""
    flipped = bytes([SAMPLE[at] ^ 1 << bit])
    path = tmp_path / "damaged.npz"
    path.write_bytes(SAMPLE[:at] + (b"" if cut else flipped) + SAMPLE[at + 1 :])
    try:
        found = read_npz(path)
    except FileError as error:
        assert_clear(error, str(path))
        return
    for info in found.values():
        assert len(read_raw(info)) == info.nbytes
