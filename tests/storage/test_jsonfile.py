"""JSON that comes with weights: read as Python's json does, within bounds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.outcomes import file_error
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage.jsonfile import parse_json, read_any_json, read_json, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(value=VALUES, escaped=st.booleans())
def test_what_python_writes_is_read(value: Any, escaped: bool) -> None:
    """Any value comes back, written as transformers does (escaped) or as loratool does."""
    text = json.dumps(value, ensure_ascii=escaped, indent=2)
    assert parse_json(text.encode("utf-8", "replace"), "x") == json.loads(text)


def test_infinity_and_nan_are_read(tmp_path: Path) -> None:
    """Python writes them, and some configs have them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": math.inf, "b": -math.inf, "c": math.nan}))
    found = read_json(path)
    assert (found["a"], found["b"]) == (math.inf, -math.inf)
    assert math.isnan(found["c"])


def test_equal_values_of_one_name_are_harmless() -> None:
    """A name may stand twice with one value, at any depth; there is nothing to choose."""
    assert parse_json(b'{"a": {"b": [1, {"c": null}]}, "a": {"b": [1, {"c": null}]}}', "x") == {
        "a": {"b": [1, {"c": None}]}
    }


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "cut": (b'{"a": [1, 2', "not valid JSON"),
    "two-values": (b"{}{}", "not valid JSON"),
    "not-utf8": (b'{"a": "\xff"}', "not valid JSON"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "byte-order-mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "half-a-pair": (b'{"a": "\\ud800"}', "surrogates"),
    "half-a-pair-as-name": (b'{"\\uDFFF": 1}', "surrogates"),
    "lists-in-lists": (b"[" * 100_000, "nested without end"),
    "objects-in-objects": (b'{"a":' * 100_000, "nested without end"),
    "endless-number": (b'{"a": ' + b"1" * 5000 + b"}", "5,000 digits"),
    "endless-negative-number": (b'{"a": -' + b"1" * 2000 + b"}", "digits"),
    "two-values-of-a-name": (b'{"r": 8, "r": 16}', "'r' stands in it twice"),
    "two-values-deep": (b'[{"x": {"r": 8, "q": 1, "r": [8]}}]', "'r' stands in it twice"),
    "third-differs": (b'{"r": 8, "r": 16, "r": 16}', "'r' stands in it twice"),
    "long-name-twice": (b'{"%s": 1, "%s": 2}' % ((b"r" * 5000,) * 2), "rrr' stands in it twice"),
    "list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_json_object_is_refused(tmp_path: Path, case: str) -> None:
    """Whatever a config holds instead of one object with one value a name, it is one error."""
    content, words = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    file_error(read_json, path, words)


def test_many_equal_names_are_no_work() -> None:
    """Names are compared as they come, not each with all others."""
    names = [f'"{i}": 0' for i in range(100_000)]
    with pytest.raises(FileError, match="'99999' stands in it twice"):
        parse_json(("{" + ", ".join([*names, '"99999": 1']) + "}").encode(), "x")


@pytest.mark.parametrize(
    ("name", "size", "longest"),
    [
        ("config.json", 44_000_001, None), ("model.safetensors.index.json", 84_000_001, None),
        ("tokenizer.json", 200_000_001, 200_000_000), ("config.json", 6 << 30, None),
    ],
)  # fmt: skip
def test_a_file_that_is_too_long_is_not_read(
    tmp_path: Path, name: str, size: int, longest: int | None
) -> None:
    """The size decides before anything is read: these files are holes of zeros."""
    path = tmp_path / name
    path.touch()
    os.truncate(path, size)
    file_error(lambda p: read_any_json(p, longest), path, "the longest file of its kind")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A pipe does not wait for a writer; a folder and a device are no files."""
    pipe, folder = tmp_path / "pipe.json", tmp_path / "folder.json"
    os.mkfifo(pipe)
    folder.mkdir()
    file_error(read_json, pipe, "a pipe")
    file_error(read_json, folder, "a directory")
    file_error(read_json, Path("/dev/zero"), "a device")


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    """An adapter may lie in a folder whose name is not UTF-8; its record is JSON all the same."""
    path = tmp_path / "loratool.json"
    write_json(path, {"name": os.fsdecode(b"a\xff")})
    assert read_json(path) == {"name": "a?"}
