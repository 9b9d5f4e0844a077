"""What is no whole model is refused in one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bases import NAMES, halves
from helpers.files import (
    ADAPTED,
    LLAMA,
    NORM,
    OTHER,
    header_file,
    load,
    small_state,
    write_base,
    write_index,
)
from helpers.outcomes import assert_clean, assert_clear, file_error, refused
from safetensors.torch import save_file

import loratool
from loratool.errors import BaseError, FileError, LoraToolError
from loratool.models.checkpoint import open_checkpoint


def test_a_missing_path_suggests_the_one_meant(tmp_path: Path, two: Path, lora: Path) -> None:
    """A mistyped path is answered with the neighbour that is most like it."""
    error = refused(FileError, tmp_path / "bsae", lora, tmp_path / "out", "bsae")
    assert str(two) in error.hint


def test_missing_shards_are_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """An unfinished download names index and missing shard before anything is written."""
    (two / NAMES[1]).unlink()
    refused(FileError, two, lora, tmp_path / "out", "index.json", NAMES[1], "1 of 2")


def test_a_dangling_shard_is_missing(tmp_path: Path, two: Path, lora: Path) -> None:
    """A link whose blob was removed from the cache counts as missing."""
    (two / NAMES[1]).unlink()
    (two / NAMES[1]).symlink_to("../blobs/gone")
    refused(FileError, two, lora, tmp_path / "out", NAMES[1])


def test_a_damaged_shard_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """A truncated shard names itself, not only the directory."""
    path = two / NAMES[1]
    path.write_bytes(path.read_bytes()[:-5])
    refused(FileError, two, lora, tmp_path / "out", str(path), "5 bytes missing")


OUTSIDE = [
    "../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "./model.safetensors", "..",
    ".", "", "a/../model.safetensors", 7, None, ["model.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_an_index_names_files_beside_itself_only(
    tmp_path: Path, two: Path, lora: Path, name: Any
) -> None:
    """An index cannot make loratool read files elsewhere, nor name what is no file."""
    save_file({OTHER: torch.ones(8, 8)}, tmp_path / "secret.safetensors")
    index = write_index(two, {ADAPTED: NAMES[0], OTHER: name})
    refused(FileError, two, lora, tmp_path / "out", str(index))


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b", "\ud800"], ids=ascii)
def test_an_impossible_file_name_is_refused(
    tmp_path: Path, two: Path, lora: Path, name: str
) -> None:
    """Names that no file can have are a FileError too, not an error of the system."""
    index = write_index(two, {ADAPTED: NAMES[0], OTHER: name})
    refused(FileError, two, lora, tmp_path / "out", str(index))


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """Index and shards of different models are refused with tensor and shard."""
    weight_map = {ADAPTED: NAMES[0], OTHER: NAMES[1], NORM: NAMES[1], "gone.weight": NAMES[0]}
    index = write_index(two, weight_map)
    refused(FileError, two, lora, tmp_path / "out", str(index), "gone.weight", NAMES[0])


def test_a_tensor_in_another_shard_than_the_index_says_is_named(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """A tensor is not looked for where the index does not put it."""
    write_index(two, {ADAPTED: NAMES[0], OTHER: NAMES[0], NORM: NAMES[1]})
    refused(FileError, two, lora, tmp_path / "out", OTHER, NAMES[0])


def test_an_unlisted_tensor_in_two_shards_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """Of two unlisted tensors with one name neither is chosen in silence."""
    first, second = halves()
    save_file({**first, "extra": torch.ones(1)}, two / NAMES[0])
    save_file({**second, "extra": torch.zeros(1)}, two / NAMES[1])
    refused(FileError, two, lora, tmp_path / "out", "'extra'")


def test_shards_whose_outputs_would_have_one_name_are_not_mixed_up(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """pytorch_model.bin and model.safetensors in one index: refused, or no tensor lost."""
    first, second = halves()
    torch.save(first, two / "pytorch_model.bin")
    save_file(second, two / "model.safetensors")
    places = dict.fromkeys(first, "pytorch_model.bin")
    write_index(two, {**places, **dict.fromkeys(second, "model.safetensors")})
    try:
        loratool.merge(two, lora, tmp_path / "out", dtype="base")
    except LoraToolError:
        return
    assert load(tmp_path / "out").keys() == first.keys() | second.keys()


INDEXES = {
    "invalid-json": '{"weight_map": {',
    "list": "[]",
    "no-weight-map": '{"metadata": {}}',
    "empty-weight-map": '{"weight_map": {}}',
    "weight-map-is-a-list": '{"weight_map": ["model.safetensors"]}',
    "empty": "",
    "html": "<!doctype html>",
    "deep": "[" * 100_000,
    "not-utf8": b'{"weight_map": {"\xff": "x"}}',
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_broken_index_is_refused(tmp_path: Path, two: Path, lora: Path, case: str) -> None:
    """Whatever is wrong with the index, the error names it."""
    content = INDEXES[case]
    index = two / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(FileError, two, lora, tmp_path / "out", str(index))


CONFIGS = ["{", "[]", "null", "", '"llama"', "[" * 100_000]


@pytest.mark.parametrize("content", CONFIGS, ids=lambda c: c[:9])
def test_a_broken_config_is_refused(tmp_path: Path, two: Path, lora: Path, content: str) -> None:
    """A damaged config.json is named, for it decides about orientation and tying."""
    (two / "config.json").write_text(content)
    refused(FileError, two, lora, tmp_path / "out", "config.json")


def test_several_files_without_an_index_are_refused(tmp_path: Path, two: Path, lora: Path) -> None:
    """Which of several files belong together is not guessed."""
    (two / "model.safetensors.index.json").unlink()
    refused(FileError, two, lora, tmp_path / "out", str(two), "2 safetensors files", "index.json")


def test_a_directory_without_weights_is_refused(tmp_path: Path, lora: Path) -> None:
    """A directory of side files alone names what is missing."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused(FileError, folder, lora, tmp_path / "out", str(folder), "no model weights")


def test_a_base_without_tensors_is_refused(tmp_path: Path, lora: Path) -> None:
    """An empty but well-formed file is no model."""
    base = write_base(tmp_path / "base", {})
    refused(BaseError, base, lora, tmp_path / "out", "no tensors")


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), 5], ids=["list", "tensor", "5"])
def test_a_torch_file_without_names_is_no_base(tmp_path: Path, lora: Path, value: Any) -> None:
    """A torch file that is no table of named tensors is refused."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    torch.save(value, base / "pytorch_model.bin")
    refused(BaseError, base, lora, tmp_path / "out", "pytorch_model.bin")


def test_a_dangling_link_among_the_side_files_is_survived_or_named(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """A tokenizer file whose blob is gone is left out or named, never a traceback."""
    (two / "tokenizer.json").symlink_to("../../blobs/gone")
    try:
        loratool.merge(two, lora, tmp_path / "out")
    except LoraToolError as error:
        assert_clear(error, "tokenizer.json")
        assert_clean(tmp_path / "out")
    else:
        assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_header_error_reaches_the_caller_unchanged(tmp_path: Path) -> None:
    """open_checkpoint and merge report a broken single file the same way."""
    path = header_file(tmp_path / "model.safetensors", {"w": 5})
    file_error(open_checkpoint, path, "'w'")
