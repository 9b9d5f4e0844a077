"""An output that exists is refused, or replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import OTHER, small_state
from helpers.merging import ADAPTER, BASE
from helpers.outcomes import assert_clear, beside, sha256s
from safetensors.torch import save_file

import loratool
from loratool.errors import OutputError, ValueRangeError
from loratool.storage import placing, staging


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize("make", [make_folder, make_file, make_link], ids=["dir", "file", "link"])
def test_an_existing_output_is_refused(
    tmp_path: Path, base: Path, lora: Path, make: Callable[[Path], None]
) -> None:
    """Whatever exists at the output, even a dead link, stays as it is."""
    output = tmp_path / "out"
    make(output)
    before = output.lstat()
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, output)
    assert_clear(caught.value, str(output))
    assert "--overwrite" not in caught.value.hint  # it would be refused too
    assert (output.lstat().st_ino, output.lstat().st_mtime_ns) == (
        before.st_ino, before.st_mtime_ns)  # fmt: skip
    assert beside(output) == []


def test_overwrite_replaces_everything(tmp_path: Path, base: Path, lora: Path) -> None:
    """After --overwrite the new model is there alone: no shard, no file of the old one."""
    output = tmp_path / "out"
    loratool.merge(BASE, ADAPTER, output)
    loratool.merge(base, lora, output, overwrite=True)
    loratool.merge(base, lora, tmp_path / "fresh")
    assert sha256s(output) == sha256s(tmp_path / "fresh")
    assert beside(output) == []


#: What people keep beside a model, and tools too.
COMPANY = [
    "notes.txt", "notes/a.txt", ".git/config", "data/train.jsonl", "README.md", "eval.json",
    "best.safetensors", ".env", "photos/config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPANY)
def test_company_stops_an_overwrite(tmp_path: Path, base: Path, lora: Path, name: str) -> None:
    """What is no part of a model stops --overwrite, by its name and before the work; in a dry run
    too. --overwrite-all says that it may go, and is the option that the first refusal offers."""
    output = tmp_path / "out"
    loratool.merge(base, lora, output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = sha256s(output)
    with pytest.raises(OutputError, match="exists") as caught:
        loratool.merge(base, lora, output)
    shown = ".git/" if name.startswith(".git") else name
    assert "--overwrite-all " in caught.value.hint
    assert f"holds {shown}, which would be lost" in caught.value.hint
    said: list[int] = []
    for options in ({"progress": lambda *_: said.append(1)}, {"dry_run": True}):
        with pytest.raises(OutputError) as caught:
            loratool.merge(base, lora, output, overwrite=True, **options)
        assert_clear(caught.value, str(output), f"- {shown}")
        assert "--overwrite-all" in caught.value.hint
    assert not said
    assert sha256s(output) == before
    loratool.merge(base, lora, output, overwrite="all")
    assert not (output / name).exists()
    assert beside(output) == []


@pytest.mark.parametrize("verb", ["resize", "combine", "extract"])
def test_company_stops_a_dry_run_that_overwrites(
    tmp_path: Path, base: Path, lora: Path, verb: str
) -> None:
    """A dry run says so of the verbs that make adapters too: what it promises, the run can do."""
    tuned, output = tmp_path / "tuned", tmp_path / "out"
    loratool.merge(base, lora, tuned)
    loratool.resize(lora, output, rank=1)
    (output / "notes.txt").write_text("mine")
    inputs = {"resize": (lora,), "combine": ([lora],), "extract": (base, tuned)}[verb]
    rank = {} if verb == "combine" else {"rank": 1}
    with pytest.raises(OutputError, match=r"- notes\.txt"):
        getattr(loratool, verb)(*inputs, output, **rank, overwrite=True, dry_run=True)


def test_company_that_comes_during_the_run_stops_it(tmp_path: Path, base: Path, lora: Path) -> None:
    """Notes written into the old output while the new one is made are not lost either."""
    output = tmp_path / "out"
    loratool.merge(base, lora, output, dtype="float32")
    before = sha256s(output)

    def note(*_: Any) -> None:
        (output / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"notes\.txt"):
        loratool.merge(base, lora, output, overwrite=True, progress=note)
    (output / "notes.txt").unlink()
    assert sha256s(output) == before
    assert beside(output) == []


def test_side_files_are_no_company(tmp_path: Path, base: Path, lora: Path) -> None:
    """A merge that is repeated replaces its own output, with all that it copied from the base."""
    (base / "assets").mkdir()
    (base / "assets" / "picture.png").write_bytes(b"png")
    (base / "modeling_small.py").write_text("class Small: ...")
    loratool.merge(base, lora, tmp_path / "out", reversible=True)
    loratool.merge(base, lora, tmp_path / "out", reversible=True, overwrite=True)
    assert (tmp_path / "out" / "assets" / "picture.png").is_file()


@pytest.mark.parametrize("overwrite", [False, True, "all"])
def test_an_empty_folder_is_an_output(
    tmp_path: Path, base: Path, lora: Path, overwrite: Any
) -> None:
    """An empty folder at the output holds nothing that could be lost: the model takes its place."""
    (tmp_path / "out").mkdir()
    loratool.merge(base, lora, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert beside(tmp_path / "out") == []


def test_the_current_folder_is_no_output(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stands in a folder that is replaced would stand in one that is removed."""
    (tmp_path / "out" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "deep")
    for place in (Path(), Path("..")):
        with pytest.raises(OutputError) as caught:
            loratool.merge(base, lora, place, overwrite=True)
        assert caught.value.hint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "deep").rmdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="current directory"):
        loratool.merge(base, lora, ".")
    output = tmp_path / "model"
    loratool.merge(base, lora, output)
    (output / "deep").mkdir()
    for here in (output, output / "deep"):
        monkeypatch.chdir(here)
        with pytest.raises(OutputError, match="current directory"):
            loratool.merge(base, lora, output, overwrite=True)


def test_a_mounted_disk_is_no_output(base: Path, lora: Path, disk: Callable[[str], Path]) -> None:
    """Nothing can take the place of a mount point, which is seen before the work."""
    place = disk("size=8M")
    said: list[int] = []
    with pytest.raises(OutputError, match="mounted"):
        loratool.merge(base, lora, place, progress=lambda *_: said.append(1))
    assert not said


def test_a_failed_overwrite_keeps_the_old_output(tmp_path: Path, base: Path, lora: Path) -> None:
    """The old model is replaced when the new one is whole, not before."""
    output = tmp_path / "out"
    loratool.merge(base, lora, output)
    before = sha256s(output)
    save_file(small_state() | {OTHER: torch.full((8, 8), torch.inf)}, base / "model.safetensors")
    with pytest.raises(ValueRangeError):
        loratool.merge(base, lora, output, overwrite=True)
    assert sha256s(output) == before
    assert beside(output) == []


@pytest.mark.parametrize("content", ["thesis.tex", ".git/config", "photos/config.json"])
def test_what_is_no_model_is_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, content: str
) -> None:
    """--overwrite never deletes a directory that holds something else than a model."""
    kept = tmp_path / "out" / content
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, tmp_path / "out", overwrite=True)
    assert_clear(caught.value, str(tmp_path / "out"))
    assert kept.read_text() == "mine"


def test_a_project_with_a_config_json_is_not_overwritten(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """A config.json alone makes no model: many programs keep their settings under that name."""
    project = tmp_path / "out"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text('{"port": 8080}')
    (project / "src" / "main.py").write_text("print()")
    with pytest.raises(OutputError):
        loratool.merge(base, lora, project, overwrite=True)
    assert (project / "src" / "main.py").is_file()


@pytest.mark.parametrize("make", [make_file, make_link], ids=["file", "dead-link"])
def test_what_is_no_directory_is_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, make: Callable[[Path], None]
) -> None:
    """--overwrite replaces model directories, not files."""
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="not a directory"):
        loratool.merge(base, lora, tmp_path / "out", overwrite=True)
    assert os.path.lexists(tmp_path / "out")


def test_a_link_to_a_model_is_not_overwritten(tmp_path: Path, base: Path, lora: Path) -> None:
    """A link is neither replaced nor followed: what it points to may have other users."""
    loratool.merge(base, lora, tmp_path / "real")
    before = sha256s(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputError):
        loratool.merge(base, lora, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert sha256s(tmp_path / "real") == before


def test_an_output_that_appears_during_the_run_is_not_replaced(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """Without --overwrite, what somebody put at the output meanwhile is not deleted."""
    output = tmp_path / "out"

    def interfere(*_: Any) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.tex").write_text("mine")

    with pytest.raises(OutputError):
        loratool.merge(base, lora, output, progress=interfere)
    assert (output / "thesis.tex").read_text() == "mine"
    assert beside(output) == []


def test_an_output_that_appears_while_flushing_is_not_replaced(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushing takes its time; what appears at the output meanwhile is not deleted either."""
    output, real_sync = tmp_path / "out", placing.sync

    def interfere(path: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / "config.json").write_text("mine")
        real_sync(path)

    monkeypatch.setattr(placing, "sync", interfere)
    with pytest.raises(OutputError):
        loratool.merge(base, lora, output)
    assert (output / "config.json").read_text() == "mine"
    assert beside(output) == []


def old_output(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def test_all_is_flushed_before_the_old_output_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder, then the folder they are put into; only then may the old one go."""
    output = old_output(tmp_path / "out")
    flushed: list[tuple[str, int]] = []

    def sync(path: Path) -> None:
        flushed.append((path.name, len(beside(output))))
        if path == tmp_path:
            raise PermissionError  # it may be written to but not read

    monkeypatch.setattr(placing, "sync", sync)
    with staging.StagedDirectory(output, overwrite=True) as staged:
        (staged.path / "sub").mkdir()
        (staged.path / "sub" / "config.json").write_text("new")
        name = staged.path.name
        staged.commit()
    assert sorted(flushed[:-1]) == sorted([(name, 1), ("sub", 1), ("config.json", 1)])
    assert flushed[-1] == (tmp_path.name, 1)
    assert (output / "sub" / "config.json").read_text() == "new"
    assert beside(output) == []


def test_the_old_output_comes_back_where_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two renames fails, on a system that cannot exchange folders."""
    output = old_output(tmp_path / "out")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".loratool-partial-" in source.name:
            raise OSError(5, "broken")
        real(source, target)

    monkeypatch.setattr(placing, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(OutputError, match="broken"),
        staging.StagedDirectory(output, overwrite=True) as staged,
    ):
        staged.commit()
    assert (output / "config.json").read_text() == "old"
    assert beside(output) == []


def test_an_output_that_is_there_stops_a_run_when_it_begins(tmp_path: Path) -> None:
    """It may have come between the first look and the work."""
    output = old_output(tmp_path / "out")
    with pytest.raises(OutputError, match="appeared"), staging.StagedDirectory(output):
        raise AssertionError
    assert beside(output) == []


def test_an_output_may_have_the_longest_name(tmp_path: Path, base: Path, lora: Path) -> None:
    """What is beside the output while it is written has its name only as far as there is room."""
    output = tmp_path / ("x" * 255)
    loratool.merge(base, lora, output)
    loratool.merge(base, lora, output, overwrite=True)
    assert os.listdir(tmp_path).count(output.name) == 1
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]
