"""Headers of safetensors files: valid ones read like the reference library, all others refused."""

from __future__ import annotations

import json
import math
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from helpers.files import CODES, header_file, random_of, raw_bytes
from helpers.headers import DATA, entry
from helpers.outcomes import assert_clear, file_error
from helpers.places import FIXTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.dtypes import DTYPE_BITS
from loratool.errors import FileError
from loratool.storage.bounded import LONGEST_LIST
from loratool.storage.header import build_header, read_header
from loratool.storage.values import read_float32, read_raw

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def pack(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_every_dtype_of_the_torch_writer_reads_equally(tmp_path: Path) -> None:
    """Names, dtypes, shapes and bytes of a file by safetensors.torch are those that went in."""
    wanted = {f"t.{code}": random_of(dtype, 3, 5) for dtype, code in CODES.items()}
    wanted |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 4), "ünï/✓": torch.ones(1, 1, 7)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(wanted, path, metadata={"format": "pt", "né": "ü"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt", "né": "ü"}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        info = found[name]
        assert (info.name, info.dtype, info.shape) == (name, CODES[tensor.dtype], tensor.shape)
        assert read_raw(info).tobytes() == raw_bytes(tensor)


def test_every_dtype_of_the_numpy_writer_reads_equally(tmp_path: Path) -> None:
    """Values of a file by safetensors.numpy come back as float32 in their own shape."""
    rng = np.random.default_rng(0)
    kinds = (np.float16, np.float32, np.float64)
    wanted = {np.dtype(k).name: rng.standard_normal((4, 3)).astype(k) for k in kinds}
    wanted |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((3, 0), np.float32)}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(wanted, path)
    found, metadata = read_header(path)
    assert metadata == {}
    for name, values in wanted.items():
        read = read_float32(found[name])
        assert read.dtype == np.float32
        assert read.shape == values.shape
        assert np.array_equal(read, values.astype(np.float32))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.safetensors")), ids=lambda p: p.name)
def test_real_files_read_equally(path: Path) -> None:
    """The files of a trained model and a trained adapter read as by the reference library."""
    found, metadata = read_header(path)
    wanted = dict(safetensors.deserialize(path.read_bytes()))
    with safetensors.safe_open(path, "np") as reference:
        assert metadata == (reference.metadata() or {})
    assert {n: (i.dtype, list(i.shape)) for n, i in found.items()} == {
        n: (t["dtype"], t["shape"]) for n, t in wanted.items()
    }
    assert all(read_raw(i).tobytes() == wanted[n]["data"] for n, i in found.items())


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    """The order in the file decides, not the order in the header: reading stays sequential."""
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "early": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    found, _ = read_header(header_file(tmp_path / "x.safetensors", header, b"abc"))
    assert list(found) == ["early", "late"]
    assert read_raw(found["late"]).tobytes() == b"bc"


def test_spaces_around_the_header_are_allowed(tmp_path: Path) -> None:
    """Writers pad the header with spaces to align the data."""
    text = json.dumps(entry()).encode() + b" " * 37
    found, _ = read_header(header_file(tmp_path / "x.safetensors", text, DATA))
    assert read_raw(found["blocks.w"]).tobytes() == DATA


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_SAFETENSORS = {
    "empty": (b"", "empty"),
    **{f"{n}-bytes": (b"\x10" + b"\0" * (n - 1), f"only {n} byte") for n in range(1, 8)},
    "lfs-pointer": (LFS, "Git LFS pointer"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "html-of-the-hub": (b'<!doctype html>\n<html class="">\n<head></head></html>', "web page"),
    "html-bare": (b"\n<html><body>Sign in</body></html>", "web page"),
    "html-upper": (b"<HTML><BODY>Forbidden</BODY></HTML>", "web page"),
    "text": (b"Entry not found. Please check the name.", "not a safetensors file"),
    "error-json": (b'{"error": "Invalid username or password."}', "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "safetensors"),
    "zeros": (b"\0" * 64, ""),
    "huge-length": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "length-above-limit": ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "length-beyond-any-file": ((1 << 62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "length-beyond-file": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "length-one-too-long": ((3).to_bytes(8, "little") + b"{}", "truncated"),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, case: str) -> None:
    """Every impostor is refused in one FileError that says what the file is instead."""
    content, words = NOT_SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    file_error(read_header, path, words)


def test_a_file_that_is_not_there_is_a_file_error(tmp_path: Path) -> None:
    """A path without a file is FileError as well, not the system's FileNotFoundError."""
    file_error(read_header, tmp_path / "model.safetensors")


def test_a_directory_is_a_file_error(tmp_path: Path) -> None:
    """A directory named like a weights file is refused in words."""
    path = tmp_path / "model.safetensors"
    path.mkdir()
    file_error(read_header, path)


VALID = json.dumps(entry()).encode()
BROKEN_JSON = {
    "not-utf8": b'{"\xff\xfe": 1}',
    "invalid-json": VALID[:-1],
    "two-values": VALID + b"{}",
    "byte-order-mark": b"\xef\xbb\xbf" + VALID,
    "nested-lists": b"[" * 200_000,
    "nested-objects": b'{"a":' * 200_000,
    "list": b"[1, 2]",
    "string": b'"w"',
    "null": b"null",
    "blank": b"        ",
    "nan": b'{"w": NaN}',
    "endless-number": b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}",
    "lone-surrogate": VALID.replace(b"blocks.w", b"blocks\\ud800"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, case: str) -> None:
    """Whatever stands where the JSON should be, it is one FileError that names the file."""
    path = header_file(tmp_path / "model.safetensors", BROKEN_JSON[case], DATA)
    file_error(read_header, path)


BAD_METADATA: list[Any] = [{"a": 1}, {"a": None}, {"a": {}}, [], ["a"], "pt", "", 0, 1, False]


@pytest.mark.parametrize("value", BAD_METADATA, ids=repr)
def test_metadata_that_is_no_table_of_strings_is_refused(tmp_path: Path, value: Any) -> None:
    """__metadata__ must map strings to strings, as the reference library demands."""
    path = header_file(tmp_path / "x.safetensors", {"__metadata__": value, **entry()}, DATA)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    file_error(read_header, path, "__metadata__")


#: Changes of the entry "blocks.w", and a word that the error must hold.
BROKEN_ENTRIES: dict[str, tuple[Any, str]] = {
    "dtype-unknown": (entry(dtype="F12"), "'F12'"),
    "dtype-lowercase": (entry(dtype="f32"), "'f32'"),
    "dtype-missing": (entry(dtype=None), "dtype"),
    "dtype-number": (entry(dtype=32), "dtype"),
    "dtype-list": (entry(dtype=["F32"]), "dtype"),
    "dtype-object": (entry(dtype={"F32": 1}), "dtype"),
    "shape-missing": (entry(shape=None), "shape"),
    "shape-number": (entry(shape=6), "shape"),
    "shape-string": (entry(shape="23"), "shape"),
    "shape-object": (entry(shape={"2": 3}), "shape"),
    "shape-negative": (entry(shape=[-2, -3]), "shape"),
    "shape-float": (entry(shape=[2.0, 3]), "shape"),
    "shape-bool": (entry(shape=[True, 6]), "shape"),
    "shape-string-entry": (entry(shape=["2", 3]), "shape"),
    "shape-huge": (entry(shape=[2**63, 3]), "shape"),
    "shape-overflow": (entry(shape=[2**32, 2**32]), ""),
    "shape-wraps-to-24-bytes": (entry(shape=[2**61, 2**61, 2**61, 6]), ""),
    "shape-of-400-axes": (entry(shape=[2**61] * 400), ""),
    "shape-of-20000-axes": (entry(shape=[2**40] * 20_000), ""),
    "shape-huge-but-empty": (entry(shape=[2**61, 2**61, 0], data_offsets=[0, 0]), ""),
    "offsets-missing": (entry(data_offsets=None), "data_offsets"),
    "offsets-one": (entry(data_offsets=[24]), "data_offsets"),
    "offsets-three": (entry(data_offsets=[0, 12, 24]), "data_offsets"),
    "offsets-reversed": (entry(data_offsets=[24, 0]), "data_offsets"),
    "offsets-negative": (entry(data_offsets=[-24, 0]), "data_offsets"),
    "offsets-float": (entry(data_offsets=[0, 24.0]), "data_offsets"),
    "offsets-bool": (entry(shape=[], dtype="U8", data_offsets=[False, True]), "data_offsets"),
    "offsets-huge": (entry(data_offsets=[2**64, 2**64 + 24]), "data_offsets"),
    "offsets-out-of-range": (entry(data_offsets=[1000, 1024]), ""),
    "span-too-short": (entry(data_offsets=[0, 20]), "24 bytes"),
    "span-too-long": (entry(data_offsets=[0, 28]), "24 bytes"),
    "span-for-other-dtype": (entry(dtype="F16"), "12 bytes"),
    "half-a-byte": (entry(dtype="F4", shape=[3], data_offsets=[0, 1]), ""),
    "not-an-object": ({"blocks.w": [1, 2]}, "description"),
    "null": ({"blocks.w": None}, "description"),
}


@pytest.mark.parametrize("case", BROKEN_ENTRIES)
def test_an_impossible_tensor_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """A wrong dtype, shape or place is one FileError that names the file, the tensor, the fault."""
    header, words = BROKEN_ENTRIES[case]
    path = header_file(tmp_path / "model.safetensors", header, DATA)
    file_error(read_header, path, "blocks.w", words)


def u8(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


BROKEN_TILINGS: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "overlap": ({"a": u8(0, 8), "b": u8(7, 12)}, bytes(12), "'b'"),
    "same-place": ({"a": u8(0, 8), "b": u8(0, 8)}, bytes(8), "overlap"),
    "nested": ({"a": u8(0, 12), "b": u8(4, 8)}, bytes(12), "'b'"),
    "empty-inside-another": ({"a": u8(0, 8), "b": u8(4, 4)}, bytes(8), "'b'"),
    "gap": ({"a": u8(0, 4), "b": u8(8, 12)}, bytes(12), "'b'"),
    "gap-at-start": ({"a": u8(4, 8)}, bytes(8), "'a'"),
    "truncated": ({"a": u8(0, 8)}, bytes(5), "3 bytes missing"),
    "no-data": ({"a": u8(0, 8)}, b"", "truncated"),
    "trailing": ({"a": u8(0, 8)}, bytes(9), "1 byte after"),
    "trailing-only": ({}, bytes(3), "3 bytes after"),
}


@pytest.mark.parametrize("case", BROKEN_TILINGS)
def test_data_must_be_covered_exactly(tmp_path: Path, case: str) -> None:
    """Gaps, overlaps, missing and surplus bytes are refused, each by name."""
    header, data, words = BROKEN_TILINGS[case]
    path = header_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    file_error(read_header, path, words)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    """Of two entries with one name, neither is chosen in silence."""
    text = b'{"a": %s, "a": %s}' % ((json.dumps(u8(0, 4)).encode(),) * 2)
    file_error(read_header, header_file(tmp_path / "x.safetensors", text, bytes(4)), "'a' twice")


def test_a_field_given_twice_is_refused(tmp_path: Path) -> None:
    """Of two shapes of one tensor, neither is chosen in silence."""
    text = VALID.replace(b'"shape"', b'"shape": [6], "shape"')
    file_error(read_header, header_file(tmp_path / "x.safetensors", text, DATA), "'shape' twice")


def test_a_name_given_twice_late_is_refused(tmp_path: Path) -> None:
    """Names are compared as they come, not each with all others."""
    one = json.dumps(u8(0, 0))
    text = "{" + ", ".join(f'"{i}": {one}' for i in [*range(20_000), 19_999]) + "}"
    path = header_file(tmp_path / "x.safetensors", text.encode(), b"")
    file_error(read_header, path, "'19999' twice")


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    """Its length decides before anything is read: this one is a hole of zeros."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((84_000_001).to_bytes(8, "little"))
    os.truncate(path, 90_000_000)
    file_error(read_header, path, "the longest that is read")


def test_the_longest_header_of_today_is_well_below_the_limit() -> None:
    """Factors on every expert of a Kimi K2, each with a name of its own, fit four times."""
    name = "base_model.model.model.layers.60.mlp.experts.383.down_proj.lora_B.weight"
    # Positions in a file of 100 GB, as wide as they get.
    entry = {"dtype": "BF16", "shape": [16, 7168], "data_offsets": [10**11, 10**11 + 229_376]}
    assert 60 * 384 * 3 * 2 * len(json.dumps({name: entry})) * 3.5 < LONGEST_LIST


GREEDY = {
    "many-tiny-entries": ("{" + ",".join(f'"{i:x}":{{}}' for i in range(40_000)) + "}", "'0'"),
    "lists-in-an-entry": ('{"w":[' + "[]," * 100_000 + "[]]}", "'w'"),
    "objects-in-an-entry": ('{"w":{"x":[' + "{}," * 100_000 + "{}]}}", "'w'"),
    "many-axes": ('{"w":{"dtype":"U8","shape":[' + "1," * 150_000 + "1]}}", "'w'"),
    "lists-in-lists": ('{"w":' + "[" * 300_000, "'w'"),
    "long-name": ('{"' + "w" * 300_000 + '":{}}', "300,000 characters"),
    "long-dtype": ('{"w":{"dtype":"' + "F" * 300_000 + '"}}', "'w'"),
    "long-dtype-within-the-limit": ('{"w":{"dtype":"' + "F" * 3000 + '"}}', "FFF"),
    "long-number": ('{"w":{"shape":[' + "1" * 300_000 + "]}}", "'w'"),
    "number-too-large": ('{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}', "shape"),
    "not-a-number": ('{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "'w'"),
    "metadata-of-lists": ('{"__metadata__":{"a":[' + "[]," * 100_000 + "[]]}}", "__metadata__"),
    "metadata-twice": ('{"__metadata__":{"a":""},"__metadata__":null}', "twice"),
    "metadata-name-twice": ('{"__metadata__":{"a":"","a":""}}', "'a' twice"),
    "half-a-pair-in-metadata": ('{"__metadata__":{"a":"\\udfff"}}', "half a character"),
    "value-without-comma": ('{"w":{} "v":{}}', "JSON|'w'"),
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_greedy_header_is_refused_before_it_fills_the_memory(tmp_path: Path, case: str) -> None:
    """What is wrong is met where it stands; nothing is built of what comes behind it."""
    text, words = GREEDY[case]
    path = header_file(tmp_path / "x.safetensors", text.encode(), b"")
    tracemalloc.start()
    try:
        error = file_error(read_header, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert any(word in error.message for word in words.split("|"))
    assert peak < 200_000 + 8 * len(text)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """A pipe by the name of a weights file does not wait for a writer."""
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    file_error(read_header, path, "a pipe")


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    """A download that stopped anywhere is a FileError, wherever it stopped."""
    whole = (FIXTURES / "adapter" / "adapter_model.safetensors").read_bytes()
    path = tmp_path / "adapter_model.safetensors"
    for length in [*range(0, 200), *range(200, len(whole), 7001), len(whole) - 1]:
        path.write_bytes(whole[:length])
        file_error(read_header, path)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def shapes(draw: st.DrawFn, dtype: str) -> tuple[int, ...]:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        shape.append(4)
    return tuple(shape)


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    names = draw(st.lists(NAMES, max_size=8, unique=True))
    dtypes = [draw(st.sampled_from(sorted(DTYPE_BITS))) for _ in names]
    return [(n, d, draw(shapes(d))) for n, d in zip(names, dtypes, strict=True)]


@on_files
@given(table=tables(), metadata=st.dictionaries(NAMES, NAMES, max_size=3), seed=st.integers(0, 99))
def test_a_built_header_reads_back(
    tmp_path: Path,
    table: list[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
    seed: int,
) -> None:
    """Any table that build_header writes comes back, from read_header and from the reference."""
    sizes = [math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in table]
    data = random.Random(seed).randbytes(sum(sizes))
    header = build_header(table, metadata)
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + data)

    found, found_metadata = read_header(path)
    assert found_metadata == metadata
    # Tensors without elements share their place with the next one, so only the rest has an order.
    filled = [name for (name, *_), size in zip(table, sizes, strict=True) if size]
    assert [name for name, info in found.items() if info.nbytes] == filled
    assert {(i.name, i.dtype, i.shape) for i in found.values()} == set(table)

    reference = dict(safetensors.deserialize(header + data))
    assert reference.keys() == found.keys()
    position = 0
    for (name, dtype, shape), size in zip(table, sizes, strict=True):
        wanted = data[position : position + size]
        position += size
        assert read_raw(found[name]).tobytes() == wanted
        assert (reference[name]["dtype"], tuple(reference[name]["shape"])) == (dtype, shape)
        assert reference[name]["data"] == wanted
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata


def check_against_reference(path: Path, content: bytes) -> None:
    """Refused in a FileError, or read inside the file; and read as the reference reads it."""
    path.write_bytes(content)
    try:
        found, _ = read_header(path)
    except FileError as error:
        assert_clear(error, str(path))
        return
    for info in found.values():
        assert info.start >= 8
        assert info.start + info.nbytes <= len(content)
        assert read_raw(info).tobytes() == content[info.start : info.start + info.nbytes]
    # What we accept, the reference accepts: no tensor exists for us alone.
    reference = dict(safetensors.deserialize(content))
    assert reference.keys() == found.keys()
    for name, info in found.items():
        wanted = reference[name]
        assert (wanted["dtype"], tuple(wanted["shape"])) == (info.dtype, info.shape)
        assert wanted["data"] == read_raw(info).tobytes()


SAMPLE = build_header(
    [("wide", "F64", (2,)), ("a.weight", "F32", (2, 3)), ("none", "BF16", (0,)), ("b", "U8", (3,))],
    {"format": "pt"},
) + bytes(range(43))

Edit = Callable[[bytes], bytes]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    kind = draw(st.sampled_from(["set", "flip", "cut", "insert", "copy"]))
    at = draw(st.integers(0, len(SAMPLE)))
    length = draw(st.integers(1, 12))
    other = draw(st.integers(0, len(SAMPLE)))
    text = draw(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from(
        [b"0", b"-", b"1", b'"', b"[", b"]", b"{", b"}", b",", b":", b" ", b"null", b"\\ud800"])
    ))  # fmt: skip
    bit = 1 << draw(st.integers(0, 7))

    def apply(content: bytes) -> bytes:
        if kind == "set":
            return content[:at] + text + content[at + len(text) :]
        if kind == "flip":
            return content[:at] + bytes(b ^ bit for b in content[at : at + 1]) + content[at + 1 :]
        if kind == "cut":
            return content[:at] + content[at + length :]
        if kind == "insert":
            return content[:at] + text + content[at:]
        return content[:at] + content[other : other + length] + content[at:]

    return apply


@settings(on_files, max_examples=600)
@given(changes=st.lists(edits(), min_size=1, max_size=3), mend=st.booleans())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, changes: list[Edit], mend: bool) -> None:
    """However a file is damaged, it is FileError or reads as the reference library reads it."""
    content = SAMPLE
    for change in changes:
        content = change(content)
    if mend and len(content) > 51:
        # Correct the length, so that the damage lies in the JSON and not in the first bytes.
        content = (len(content) - 51).to_bytes(8, "little") + content[8:]
    check_against_reference(tmp_path / "x.safetensors", content)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(0, 8), st.floats(), st.text(),
        st.sampled_from([2**31, 2**61, 2**63, 2**64, -1, 24, 1e400, "F32", "U8", "F4"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(on_files, max_examples=400)
@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets", "extra", "", "__metadata__"]),
    value=JSON,
)
def test_any_json_in_any_field_is_refused_or_harmless(tmp_path: Path, key: str, value: Any) -> None:
    """A field of any JSON type is FileError or reads as the reference library reads it."""
    header = entry(**{key: value}) if key not in ("", "__metadata__") else entry()
    if key == "":
        header = {"blocks.w": value}
    elif key == "__metadata__":
        header["__metadata__"] = value
    check_against_reference(tmp_path / "x.safetensors", pack(json.dumps(header).encode()))
