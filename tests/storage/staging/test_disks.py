"""Full and forbidden disks, and inputs that go away."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.merging import large_base, large_lora, open_files
from helpers.outcomes import assert_clean, assert_clear, refused
from helpers.permissions import permissions_that_count
from helpers.processes import start_merge
from safetensors.numpy import save_file

import loratool
from loratool.errors import FileError, LoraToolError, OutputError
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool


def test_too_little_space_is_seen_before_writing(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    """A model larger than the free space is refused with both sizes, and nothing is written."""
    place = disk("size=8M")
    base, lora = large_base(tmp_path / "base", 12), large_lora(tmp_path / "lora")
    free = shutil.disk_usage(place).free
    error = refused(OutputError, base, lora, place / "out", "8.39 MB", "14.7 MB", str(place))
    assert "Free some space" in error.hint
    assert shutil.disk_usage(place).free == free
    # Parents that are still to be made do not hide the disk they will be on.
    with pytest.raises(OutputError, match=r"8\.39 MB"):
        loratool.merge(base, lora, place / "new" / "deep" / "out")
    assert os.listdir(place) == []


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_disk_that_fills_up_in_mid_write_leaves_nothing(
    tmp_path: Path, disk: Callable[[str], Path], when: str
) -> None:
    """Space that others take during the run ends it in words; all of its own is given back."""
    place = disk("size=8M")
    base, lora = large_base(tmp_path / "base", 4), large_lora(tmp_path / "lora")
    (base / "tokenizer.json").write_bytes(b" " * 300_000)
    filler = place / "filler"

    def fill(done: int, total: int, _label: str) -> None:
        if filler.exists() or (when == "late" and done < total):
            return
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(65536))
            except OSError:
                pass

    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, place / "out", progress=fill, threads=1)
    assert_clear(caught.value, "disk is full", str(place))
    assert "partial" not in caught.value.message  # which is gone by now
    assert os.listdir(place) == ["filler"]
    assert open_files(place) == []
    filler.unlink()
    loratool.merge(base, lora, place / "out")
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("options", ["size=64k", "size=1M,nr_inodes=2", "size=1M,nr_inodes=3"])
def test_a_disk_without_room_for_the_first_file_leaves_nothing(
    base: Path,
    lora: Path,
    disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
) -> None:
    """Also where not even the lock or the header fits, the run leaves no directory, no open file,
    and names the disk that is full."""
    place = disk(options)
    if "nr_inodes" not in options:
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    before = os.listdir(place)
    monkeypatch.setattr("loratool.storage.destination.free_bytes", lambda _: 1 << 40)
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, place / "out")
    assert_clear(caught.value, "disk is full", str(place))
    assert "partial" not in caught.value.message  # which is gone by now
    assert os.listdir(place) == before
    assert open_files(place) == []


@pytest.mark.process
def test_a_limit_on_file_size_is_named(tmp_path: Path) -> None:
    """RLIMIT_FSIZE (ulimit -f), which stops writing everywhere, ends the run in words."""
    base, lora = large_base(tmp_path / "base", 4), large_lora(tmp_path / "lora")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {1 << 20}))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with start_merge(base, lora, tmp_path / "out", limit) as process:
        said, _ = process.communicate(timeout=60)
    code, error = process.returncode, json.loads(said)
    assert (code, error["kind"]) == (1, "OutputError")
    assert "larger than" in error["message"]
    assert_clean(tmp_path / "out")


def test_a_read_only_disk_is_named(base: Path, lora: Path, disk: Callable[[str], Path]) -> None:
    """A disk mounted read-only is an OutputError that names the place."""
    place = disk("size=8M")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    refused(OutputError, base, lora, place / "out", str(place), "not allowed")


def test_a_forbidden_parent_is_named(tmp_path: Path, base: Path, lora: Path) -> None:
    """A parent directory without write permission is an OutputError that names it."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        refused(OutputError, base, lora, parent / "out", str(parent), "not allowed")


@pytest.mark.parametrize(
    "name",
    ["in/base/model.safetensors", "in/base/config.json", "in/base", "in/base/tokenizer.json",
     "in/lora/adapter_model.safetensors", "in/lora/adapter_config.json", "in/lora"],
)  # fmt: skip
def test_an_input_that_may_not_be_read_is_named(
    tmp_path: Path, base: Path, lora: Path, name: str
) -> None:
    """An input without read permission is a FileError that names it, and there is no output."""
    (base / "tokenizer.json").write_text("{}")
    (tmp_path / name).chmod(0)
    try:
        with permissions_that_count():
            refused(FileError, base, lora, tmp_path / "out", str(tmp_path / name))
    finally:
        (tmp_path / name).chmod(0o700)


def test_a_file_in_the_parent_s_place_is_named(tmp_path: Path, base: Path, lora: Path) -> None:
    """An output below a file is an OutputError."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, tmp_path / "file" / "out")
    assert_clear(caught.value, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_is_too_long_is_named(tmp_path: Path, base: Path, lora: Path) -> None:
    """An output name that the file system does not allow is one error, with nothing left."""
    with pytest.raises(LoraToolError, match="too long"):
        loratool.merge(base, lora, tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == ["in"]


def test_an_input_that_shrinks_during_the_run_is_named(tmp_path: Path) -> None:
    """A base file cut short while it is read is a FileError about the base; no output."""
    base, lora = large_base(tmp_path / "base", 8), large_lora(tmp_path / "lora")
    victim = base / "model-00002-of-00002.safetensors"

    def cut(*_: Any) -> None:
        os.truncate(victim, 1000)

    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, lora, tmp_path / "out", progress=cut, threads=1)
    assert caught.value.code == "bad-file"
    assert_clear(caught.value, str(victim))
    assert_clean(tmp_path / "out")


def test_an_input_that_vanishes_during_the_run_is_named(tmp_path: Path) -> None:
    """A base file removed before it is read is a FileError about the base, not about writing."""
    base, lora = large_base(tmp_path / "base", 8), large_lora(tmp_path / "lora")
    victim = base / "model-00002-of-00002.safetensors"

    def remove(*_: Any) -> None:
        victim.unlink(missing_ok=True)

    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, lora, tmp_path / "out", progress=remove, threads=1)
    assert caught.value.code == "bad-file", caught.value.message
    assert_clear(caught.value, str(victim))
    assert_clean(tmp_path / "out")


def test_too_few_descriptors_are_named_as_such(tmp_path: Path) -> None:
    """A file that cannot be opened because too many are open was not moved or removed."""
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path)
    info = read_header(path)[0]["a"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with FilePool() as pool, pytest.raises(FileError) as caught:
            pool.read_into(info, 0, memoryview(bytearray(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caught.value.hint


def test_a_way_through_a_folder_that_is_not_there_makes_none(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """`none/../out` is `out`."""
    loratool.merge(base, lora, tmp_path / "none" / ".." / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
