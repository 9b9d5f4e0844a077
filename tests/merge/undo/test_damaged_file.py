"""The undo file, damaged: the base comes back right or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.files import ADAPTED, NORM, lora_on
from helpers.outcomes import assert_clean, assert_clear, sha256s
from helpers.undoing import flipped, several_blocks
from helpers.unmerging import UNDO

import loratool
from loratool.errors import FileError, LoraToolError
from loratool.merging.undo.residual import compress, decompress
from loratool.storage.header import build_header, read_header


def right_or_refused(merged: tuple[Path, Path, Path], back: Path) -> LoraToolError | None:
    """Unmerge: the base comes back, or there is a clear error and no output."""
    base, lora, out = merged
    try:
        loratool.unmerge(out, lora, back)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
        return error
    assert sha256s(back) == sha256s(base)
    shutil.rmtree(back)
    return None


def test_any_flipped_bit_is_refused_or_harmless(
    merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Wherever a bit of the undo file flips, the base comes back right or not at all."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    padding = range(8 + len(header.rstrip()), 8 + len(header))
    places = [i for i in range(len(content)) if i not in padding]
    refused = 0
    tried = [*places[::4], padding[0], padding[-1]]
    for turn, place in enumerate(tried):
        undo.write_bytes(flipped(content, place, turn * 3 % 8))
        refused += right_or_refused(merged, tmp_path / "back") is not None
    assert refused > 0.8 * len(tried)
    undo.write_bytes(content)
    assert right_or_refused(merged, tmp_path / "back") is None


@pytest.mark.parametrize(
    "entry",
    ["residual:", "whole:", "header:", "file:config", "file:tokenizer", "file:model", '"base"'],
)
def test_an_entry_of_another_name_is_refused(
    entry: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """An entry that damage has renamed is missed: no file is left out or made up in its place."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    wrong = entry[:-1] + chr(ord(entry[-1]) ^ 1)
    assert entry.encode() in content
    undo.write_bytes(content.replace(entry.encode(), wrong.encode(), 1))
    error = right_or_refused(merged, tmp_path / "back")
    assert isinstance(error, FileError)


def test_a_truncated_undo_file_is_refused(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """However much of it is missing, or too much, the undo file is refused by name."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(content), 97), len(content) - 1]:
        undo.write_bytes(content[:length])
        error = right_or_refused(merged, tmp_path / "back")
        assert isinstance(error, FileError)
        assert str(undo) in error.message
    undo.write_bytes(content + b"\0")
    assert isinstance(right_or_refused(merged, tmp_path / "back"), FileError)


@pytest.mark.parametrize("other", ["folder", "model", "adapter", "text"])
def test_something_else_in_the_place_of_the_undo_file_is_refused(
    other: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Weights, text or nothing readable where the undo file should be: an error, no traceback."""
    base, lora, out = merged
    undo = out / UNDO
    undo.unlink()
    if other == "folder":
        undo.mkdir()
        with pytest.raises(LoraToolError):
            loratool.unmerge(out, lora, tmp_path / "back")
        assert_clean(tmp_path / "back")
        return
    if other == "text":
        undo.write_text("see elsewhere")
    else:
        source = base if other == "model" else lora
        shutil.copy(next(iter(sorted(source.glob("*.safetensors")))), undo)
    error = right_or_refused(merged, tmp_path / "back")
    assert isinstance(error, FileError)
    assert str(undo) in error.message


def test_the_undo_file_of_another_merge_is_refused(
    merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """An undo file made for the same base with another adapter gives an error, not a wrong base."""
    base, _, out = merged
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(base, other, tmp_path / "elsewhere", reversible=True)
    shutil.copy(tmp_path / "elsewhere" / UNDO, out / UNDO)
    assert right_or_refused(merged, tmp_path / "back") is not None


Table = dict[str, Any]


def rewrite(
    undo: Path, change: Callable[[Table], Any], extra: dict[str, bytes] | None = None
) -> None:
    """Write an undo file again with another table of the base, and entries more."""
    entries, _ = read_header(undo)
    content = undo.read_bytes()
    data = {n: content[i.start : i.start + i.nbytes] for n, i in entries.items()}
    table = json.loads(decompress(data.pop("base"), 1 << 30))
    table = change(table) or table
    data |= extra or {}
    data["base"] = compress(json.dumps(table).encode())
    shapes = [(name, "U8", (len(value),)) for name, value in data.items()]
    undo.write_bytes(build_header(shapes, {"format": "loratool-undo"}) + b"".join(data.values()))


def first(table: Table) -> Table:
    row: Table = table["tensors"][ADAPTED]
    return row


#: Tables that no merge writes.
TABLES: dict[str, Callable[[Table], Any]] = {
    "a-list": lambda t: [t],
    "no-version": lambda t: t.pop("version") and None,
    "later-version": lambda t: t.update(version=9),
    "no-tensors": lambda t: t.pop("tensors") and None,
    "tensors-are-a-list": lambda t: t.update(tensors=list(t["tensors"])),
    "tensor-is-null": lambda t: t["tensors"].update({ADAPTED: None}),
    "tensor-missing": lambda t: t["tensors"].pop(ADAPTED) and None,
    "tensor-more": lambda t: t["tensors"].update({"new.weight": dict(first(t))}),
    "unknown-dtype": lambda t: first(t).update(dtype="F15"),
    "dtype-is-a-list": lambda t: first(t).update(dtype=["F32"]),
    "other-dtype": lambda t: first(t).update(dtype="F16"),
    "wider-dtype": lambda t: first(t).update(dtype="F32"),
    "other-shape": lambda t: first(t).update(shape=[4, 16]),
    "longer-shape": lambda t: first(t).update(shape=[80, 80]),
    "negative-shape": lambda t: first(t).update(shape=[-8, -8]),
    "shape-is-text": lambda t: first(t).update(shape="88"),
    "shape-of-floats": lambda t: first(t).update(shape=[8.0, 8.0]),
    "earlier-version": lambda t: t.update(version=1),
    "other-hash": lambda t: first(t).update(digest="blake3:" + "0" * 64),
    "hash-is-null": lambda t: first(t).update(digest=None),
    "hash-is-missing": lambda t: first(t).pop("digest") and None,
    "hash-of-another-kind": lambda t: first(t).update(digest="0" * 64),
    "hash-of-an-unknown-kind": lambda t: first(t).update(digest="md5:" + "0" * 32),
    "short-hash": lambda t: first(t).update(digest=first(t)["digest"][:-2]),
    "file-hash-of-another-kind": lambda t: t["files"].update({"config.json": "0" * 64}),
    "header-hash-of-an-unknown-kind": lambda t: t["headers"].update(
        dict.fromkeys(t["headers"], "md5:" + "0" * 32)
    ),
    "side-file-hash-of-another-kind": lambda t: t["side_files"].update({"config.json": "0" * 64}),
    "whole": lambda t: first(t).update(whole=True),
    "not-whole": lambda t: t["tensors"]["z.weight"].update(whole=False),
    "step-of-3": lambda t: t["tensors"][NORM].update(step=3),
    "step-is-negative": lambda t: t["tensors"][NORM].update(step=-4),
    "step-is-text": lambda t: t["tensors"][NORM].update(step="4"),
    "sizes-of-zero": lambda t: t["tensors"][NORM].update(sizes=[0]),
    "sizes-are-huge": lambda t: t["tensors"][NORM].update(sizes=[10**30]),
    "sizes-are-negative": lambda t: t["tensors"][NORM].update(sizes=[-1]),
    "sizes-are-text": lambda t: t["tensors"][NORM].update(sizes=["a"]),
    "taken-by-nothing": lambda t: first(t).update(taken=[[0, 8, 2, 8]]),
    "taken-elsewhere": lambda t: first(t).update(taken=[[7, 8, 0, 8]]),
    "taken-of-another-shape": lambda t: first(t).update(taken=[[0, 9, 0, 8]]),
    "taken-is-text": lambda t: first(t).update(taken=["0808"]),
    "no-shards": lambda t: t.pop("shards") and None,
    "shards-are-empty": lambda t: t.update(shards=[]),
    "shard-twice": lambda t: t["shards"].append(t["shards"][0]),
    "two-shards-of-one-name": lambda t: t["shards"][1].update(file=t["shards"][0]["file"]),
    "shard-without-tensors": lambda t: t["shards"].append({"file": "x", "tensors": []}),
    "shard-name-is-null": lambda t: t["shards"][0].update(file=None),
    "shard-name-is-empty": lambda t: t["shards"][0].update(file=""),
    "shard-name-is-a-folder": lambda t: t["shards"][0].update(file="."),
    "shard-name-with-a-zero": lambda t: t["shards"][0].update(file="a\0b"),
    "shard-name-is-the-config": lambda t: t["shards"][0].update(file="config.json"),
    "shard-elsewhere": lambda t: t["shards"][0].update(file="../escaped.safetensors"),
    "shard-at-the-root": lambda t: t["shards"][0].update(file="/escaped.safetensors"),
    "shard-order": lambda t: t["shards"][0]["tensors"].reverse(),
    "shards-of-a-list": lambda t: t["shards"][0].update(tensors=[[ADAPTED]]),
    "no-side-files": lambda t: t.pop("side_files") and None,
    "side-files-are-a-list": lambda t: t.update(side_files=["config.json"]),
    "side-file-elsewhere": lambda t: t["side_files"].update({"../escaped": "0" * 64}),
    "side-file-is-null": lambda t: t["side_files"].update({"config.json": None}),
    "side-file-missing": lambda t: t["side_files"].pop("config.json") and None,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_no_merge_writes_is_refused(
    name: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A made-up undo file cannot crash the run, write elsewhere, or pass for the base."""
    before = set(os.listdir(tmp_path.parent))
    rewrite(merged[2] / UNDO, TABLES[name])
    error = right_or_refused(merged, tmp_path / "back")
    if name == "later-version":
        assert "later loratool" in str(error)
    assert set(os.listdir(tmp_path.parent)) == before
    assert not list(tmp_path.rglob("*escaped*"))


ENTRIES: dict[str, bytes] = {
    "file:../escaped": compress(b"x"),
    "file:/escaped": compress(b"x"),
    "file:": compress(b"x"),
    "file:a\0b": compress(b"x"),
    "file:config.json": compress(b"[1, 2]"),
    "file:tokenizer.json": b"not compressed",
    "file:model-00001-of-00002.safetensors": compress(b"x"),
    "header:model-00001-of-00002.safetensors": compress(b"\x02\0\0\0\0\0\0\0{}"),
    "header:../escaped": compress(b"x"),
    "gain:" + ADAPTED + ":0": np.ones(8, np.float32).tobytes(),
    "gain:" + ADAPTED + ":0 ": b"abc",
    "residual:unheard": b"abc",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_no_merge_writes_is_refused_or_harmless(
    name: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Nor can a made-up entry."""
    before = set(os.listdir(tmp_path.parent))
    rewrite(merged[2] / UNDO, lambda table: None, {name: ENTRIES[name]})
    right_or_refused(merged, tmp_path / "back")
    assert set(os.listdir(tmp_path.parent)) == before
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("length", [0, 1, 3, 7, 28, 36])
def test_gains_of_another_length_are_refused(length: int, tmp_path: Path) -> None:
    """What DoRA multiplied with must be there for every row, no more and no less."""
    base, adapters = several_blocks(tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapters[1], out, reversible=True)
    gain = f"gain:{ADAPTED}:0"
    assert gain in read_header(out / UNDO)[0]
    rewrite(out / UNDO, lambda table: None, {gain: b"\x3f" * length})
    assert right_or_refused((base, adapters[1], out), tmp_path / "back") is not None
