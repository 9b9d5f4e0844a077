"""Runs that are killed or interrupted leave no output, and the next run cleans up after them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.digests import blake3s
from helpers.files import load
from helpers.merging import large_base, large_lora, open_files, work_of
from helpers.outcomes import assert_clean, beside, sha256s
from helpers.processes import start_merge, wait_for

import loratool
from loratool.errors import LoraToolError, OutputError
from loratool.storage import placing as writer
from loratool.storage.staging import StagedDirectory


def paused(after: int, go: Path) -> str:
    """A prelude that makes a merge wait, `after` bytes of its output, until `go` exists."""
    return (
        "def progress(done, total, label):\n"
        f"    while done >= {after} and not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "options['progress'] = progress"
    )


def size_of_work(output: Path) -> int:
    """Bytes of shards that runs for `output` have on the disk right now."""
    shards = [path for path in work_of(output) if path.suffix == ".safetensors"]
    return sum(path.stat().st_blocks * 512 for path in shards)


@pytest.mark.process
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    """SIGKILL in mid-write: no output, inputs unharmed; the next run leaves nothing of it."""
    base = large_base(tmp_path / "base", 64, shards=4)
    lora, output = large_lora(tmp_path / "lora"), tmp_path / "out"
    before = sha256s(base)
    process = start_merge(base, lora, output, paused(20_000_000, tmp_path / "go"))
    wait_for(lambda: size_of_work(output) > 20_000_000, process)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    assert beside(output) == [".out.loratool-work"]
    assert size_of_work(output) < 60_000_000  # it was not done
    assert sha256s(base) == before

    loratool.merge(base, lora, output)
    assert beside(output) == []
    provenance = json.loads((output / "loratool.json").read_text())
    assert provenance["shards"] == blake3s(output)
    assert load(output).keys() == load(base).keys()


#: Writes slowly, and as slowly flushes what it has written.
SLOW = {
    "writing": "options['progress'] = lambda *a: time.sleep(0.1)",
    "flushing": "import loratool.storage.placing as w\nw.sync = lambda p: time.sleep(0.5)",
}


@pytest.mark.process
@pytest.mark.parametrize("phase", SLOW)
def test_an_interrupted_run_leaves_finished_files_alone(tmp_path: Path, phase: str) -> None:
    """SIGINT (Ctrl-C), while it writes or while it finishes, ends a run soon. Half a file is
    removed, and so is all of it where none is finished."""
    base, lora = large_base(tmp_path / "base", 12), large_lora(tmp_path / "lora")
    output = tmp_path / "out"
    process = start_merge(base, lora, output, SLOW[phase])
    if phase == "writing":
        wait_for(lambda: size_of_work(output) > 2_000_000, process)
    else:
        wait_for(lambda: bool(list(tmp_path.glob(".out*/*/loratool.json"))), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    if phase == "writing":
        assert_clean(output)
    else:
        assert not output.exists()
        names = sorted(path.name for path in work_of(output))
        shards = sorted(path.name for path in base.glob("*.safetensors"))
        assert names == sorted(["order.json", *shards, *(f"{shard}.json" for shard in shards)])


@pytest.mark.process
def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    """A second run for the same output learns at once that there is another one, which finishes."""
    base, lora = large_base(tmp_path / "base", 8), large_lora(tmp_path / "lora")
    output, go = tmp_path / "out", tmp_path / "go"
    process = start_merge(base, lora, output, paused(2_000_000, go))
    wait_for(lambda: size_of_work(output) > 2_000_000, process)
    partial, size = beside(output), size_of_work(output)
    said: list[int] = []
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="Another run is writing"):
            loratool.merge(
                base, lora, output, overwrite=overwrite, progress=lambda *_: said.append(1)
            )
    assert not said
    assert process.poll() is None
    assert beside(output) == partial
    assert size_of_work(output) >= size
    go.touch()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert beside(output) == []
    assert (output / "loratool.json").is_file()


def test_leftovers_are_told_from_company(tmp_path: Path) -> None:
    """What a dead run for this output left is removed, what a living one has made is not, nor
    what belongs to another output."""
    dead, foreign = tmp_path / ".out.loratool-partial-dead", tmp_path / ".o.loratool-partial-dead"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    with StagedDirectory(tmp_path / "out") as alive:
        assert not dead.exists()
        (alive.path / "model.safetensors").write_bytes(b"x")
        with pytest.raises(OutputError, match="Another run"), StagedDirectory(tmp_path / "out"):
            pass
        assert (alive.path / "model.safetensors").read_bytes() == b"x"
    assert (foreign / "model.safetensors").is_file()


def test_a_run_that_is_finishing_is_company_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock holds until the output is in place, so nobody removes it while it is flushed."""
    output = tmp_path / "out"
    real_sync = writer.sync
    refused: list[bool] = []

    def sync_with_company(path: Path) -> None:
        if path.parent != tmp_path.parent:  # all but the last, of the folder they are in
            with pytest.raises(OutputError, match="Another run"), StagedDirectory(output):
                pass
            refused.append(True)
        real_sync(path)

    monkeypatch.setattr(writer, "sync", sync_with_company)
    with StagedDirectory(output) as staged:
        (staged.path / "model.safetensors").write_bytes(b"whole")
        staged.commit()
    assert refused
    assert os.listdir(output) == ["model.safetensors"]
    assert (output / "model.safetensors").read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["out[1]", "out*", "o?t", "[!a]", "-out", "вывод", "a b"])
def test_leftovers_are_found_for_any_output_name(
    tmp_path: Path, base: Path, lora: Path, name: str
) -> None:
    """Characters that mean something in patterns mean themselves in an output's name."""
    (tmp_path / f".{name}.loratool-partial-dead").mkdir()
    (tmp_path / ".outside.loratool-partial-dead").mkdir()
    loratool.merge(base, lora, tmp_path / name)
    assert beside(tmp_path / name) == [".outside.loratool-partial-dead"]


def test_an_overwrite_that_died_between_its_renames_is_undone(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """The old output, moved aside by a run that died then, comes back and is not replaced
    without --overwrite."""
    output, aside = tmp_path / "out", tmp_path / ".out.loratool-replaced-123"
    loratool.merge(base, lora, aside, dtype="float32")
    before = sha256s(aside)
    with pytest.raises(OutputError):
        loratool.merge(base, lora, output)
    assert sha256s(output) == before
    loratool.merge(base, lora, output, overwrite=True)
    assert sha256s(output) != before
    assert beside(output) == []


def test_an_old_output_left_aside_is_removed(tmp_path: Path, base: Path, lora: Path) -> None:
    """The old output of a run that died after its renames is removed by the next overwrite."""
    output, aside = tmp_path / "out", tmp_path / ".out.loratool-replaced-123"
    loratool.merge(base, lora, output)
    shutil.copytree(output, aside)
    loratool.merge(base, lora, output, overwrite=True)
    assert beside(output) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_from_progress_leaves_nothing(
    tmp_path: Path, base: Path, lora: Path, threads: int
) -> None:
    """An exception of the caller's own goes through unchanged, and nothing stays."""

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        loratool.merge(base, lora, tmp_path / "out", progress=fail, threads=threads)
    assert_clean(tmp_path / "out")
    assert open_files(tmp_path) == []


def test_an_interrupt_while_the_folder_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between making the staging folder and using it: nobody else would clean it up."""

    def interrupt(mask: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "umask", interrupt)
    with pytest.raises(KeyboardInterrupt), StagedDirectory(tmp_path / "new" / "out"):
        pass
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_old_output_put_back_stops_the_next_run_at_its_start(tmp_path: Path) -> None:
    """After a crash between two renames the old output is put back, and not merged over."""
    base = small_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    (tmp_path / ".out.loratool-replaced-123").mkdir()
    (tmp_path / ".out.loratool-replaced-123" / "model.safetensors").write_bytes(b"old")
    asked: list[int] = []
    with pytest.raises(LoraToolError, match="exists"):
        loratool.merge(
            base, adapter, tmp_path / "out", progress=lambda done, total, name: asked.append(done)
        )
    assert asked == []
    assert (tmp_path / "out").is_dir()
