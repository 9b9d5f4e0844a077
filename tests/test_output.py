"""The output: whole and the same every time, or not there at all, whatever happens on the way.

Real processes on real file systems: runs are killed and interrupted in the middle of writing, and
small memory disks are filled up or made read-only under a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from files import (
    ADAPTED,
    NORM,
    OTHER,
    State,
    assert_clean,
    assert_clear,
    beside,
    child_merge,
    load,
    lora_on,
    permissions_that_count,
    random_of,
    refused,
    same,
    sha256s,
    small_lora,
    small_state,
    start_merge,
    write_base,
)
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError, LoraToolError, OutputError, ValueRangeError
from loratool.storage import staging as writer
from loratool.storage.staging import StagedDirectory

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "in" / "base", small_state())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "in" / "lora")


def large_base(folder: Path, megabytes: int, shards: int = 2) -> Path:
    """A base of random bfloat16 in shards, with an adapted tensor in the first."""
    block = random_of(torch.bfloat16, 512 * 1024, seed=4)
    parts: list[State] = [{} for _ in range(shards)]
    parts[0][ADAPTED] = random_of(torch.bfloat16, 1024, 1024)
    for number in range(megabytes):
        parts[number % shards][f"model.layers.{number}.mlp.weight"] = block + number
    return write_base(folder, *parts)


def large_lora(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    return lora_on(folder, rng.standard_normal((1024, 4)), rng.standard_normal((4, 1024)))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds while `process` is alive."""
    until = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def paused(after: int, go: Path) -> str:
    """A prelude that makes a merge wait, `after` bytes of its output, until `go` exists."""
    return (
        "def progress(done, total, label):\n"
        f"    while done >= {after} and not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "options['progress'] = progress"
    )


def size_of_partials(output: Path) -> int:
    """Bytes that runs for `output` have on the disk right now."""
    found = output.parent.glob(".out.loratool-partial-*/*.safetensors")
    return sum(path.stat().st_blocks * 512 for path in found)


# --- complete and the same every time ------------------------------------------------------------


def test_the_result_does_not_depend_on_threads_or_on_the_run(tmp_path: Path) -> None:
    """Two processes, and 1, 2 and 4 threads, write the same bytes, loratool.json included."""
    base, lora = tmp_path / "base", large_lora(tmp_path / "lora")
    odd = {
        ADAPTED: random_of(torch.bfloat16, 1024, 1024), OTHER: random_of(torch.float32, 700, 1900),
        "model.embed_tokens.weight": random_of(torch.float16, 1_300_003),
    }  # fmt: skip
    write_base(base, odd, {NORM: random_of(torch.float64, 77)})
    runs = []
    for number, threads in enumerate((1, 2, 4)):
        folder = tmp_path / str(number) / "out"
        loratool.merge(base, lora, folder, threads=threads)
        runs.append(sha256s(folder))
    for number in (3, 4):
        folder = tmp_path / str(number) / "out"
        code, error, _ = child_merge(base, lora, folder, env={"PYTHONHASHSEED": str(number)})
        assert (code, error) == (0, {})
        runs.append(sha256s(folder))
    assert len(runs[0]) == 5
    assert all(run == runs[0] for run in runs)


@pytest.fixture(scope="module")
def fixture_merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixtures, merged."""
    output = tmp_path_factory.mktemp("merged") / "out"
    loratool.merge(BASE, ADAPTER, output)
    return output


def test_an_output_is_complete(fixture_merged: Path) -> None:
    """All tensors and side files are there, and nothing else, nor beside it."""
    names = {p.name for p in fixture_merged.iterdir()}
    assert names == {p.name for p in BASE.iterdir()} | {"loratool.json"}
    shapes = {n: t.shape for n, t in load(BASE).items()}
    merged = load(fixture_merged)
    assert {n: t.shape for n, t in merged.items()} == shapes
    assert {t.dtype for t in merged.values()} == {torch.float16}
    assert os.listdir(fixture_merged.parent) == ["out"]


def test_provenance_holds_the_hashes_of_the_files(fixture_merged: Path) -> None:
    """loratool.json gives the sha256 of every shard and of the adapter as they are on the disk."""
    provenance = json.loads((fixture_merged / "loratool.json").read_text())
    files = sha256s(fixture_merged)
    assert provenance["shards"] == {n: h for n, h in files.items() if n.endswith(".safetensors")}
    assert provenance["adapters"][0]["files"] == sha256s(ADAPTER)


def test_the_index_fits_the_shards(fixture_merged: Path) -> None:
    """total_size is the bytes of all tensors, weight_map lists each in the shard that holds it."""
    index = json.loads((fixture_merged / "model.safetensors.index.json").read_text())
    merged = load(fixture_merged)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    there = {n: p.name for p in fixture_merged.glob("*.safetensors") for n in load_one(p)}
    assert index["weight_map"] == there
    assert there == json.loads((BASE / "model.safetensors.index.json").read_text())["weight_map"]


def load_one(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
        return list(file.keys())


def test_a_single_file_has_no_index(tmp_path: Path, base: Path, lora: Path) -> None:
    """A base in one file gives one file; total_size of nothing is written nowhere."""
    loratool.merge(base, lora, tmp_path / "out")
    assert set(sha256s(tmp_path / "out")) == {"model.safetensors", "config.json", "loratool.json"}
    load_one(tmp_path / "out" / "model.safetensors")


def test_inputs_are_not_touched(tmp_path: Path, base: Path, lora: Path) -> None:
    """Neither content nor times of the inputs change, nor does a file appear among them."""

    def state() -> list[tuple[str, int, str]]:
        files = sha256s(tmp_path / "in")
        return [(n, (tmp_path / "in" / n).stat().st_mtime_ns, h) for n, h in files.items()]

    before = state()
    loratool.merge(base, lora, tmp_path / "out")
    assert state() == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_of_any_new_file(
    tmp_path: Path, base: Path, lora: Path, umask: int
) -> None:
    """The umask decides, not the private staging directory nor the mode of the input files."""
    for path in base.iterdir():
        path.chmod(0o400)
    (base / "sub").mkdir()
    (base / "sub" / "tool.py").write_text("x")
    before = os.umask(umask)
    try:
        loratool.merge(base, lora, tmp_path / "out")
        assert os.umask(umask) == umask  # unchanged by the run
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "sub").stat().st_mode) == 0o777 & ~umask
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_missing_parents_are_made(tmp_path: Path, base: Path, lora: Path) -> None:
    """An output in directories that do not exist yet is made with them."""
    loratool.merge(base, lora, tmp_path / "new" / "deeper" / "out")
    assert (tmp_path / "new" / "deeper" / "out" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "new" / "deeper") == ["out"]


def test_a_refused_merge_makes_no_parents(tmp_path: Path, base: Path, lora: Path) -> None:
    """A run that fails while writing takes away the parent directories it made."""
    state = small_state() | {OTHER: torch.full((8, 8), torch.nan)}
    save_file(state, base / "model.safetensors")
    with pytest.raises(ValueRangeError):
        loratool.merge(base, lora, tmp_path / "new" / "deeper" / "out")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, base: Path, lora: Path) -> None:
    """A dry run reports the bytes that a run writes, and touches no disk."""
    output = tmp_path / "new" / "out"
    planned = loratool.merge(base, lora, output, dry_run=True)
    assert not (tmp_path / "new").exists()
    done = loratool.merge(base, lora, output)
    assert planned.bytes_written == done.bytes_written
    assert done.bytes_written == sum(t.nbytes for t in load(output).values())


# --- an output that exists -----------------------------------------------------------------------


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [Path.mkdir, make_file, make_link], ids=["dir", "file", "link"])
def test_an_existing_output_is_refused(
    tmp_path: Path, base: Path, lora: Path, make: Callable[[Path], None]
) -> None:
    """Whatever exists at the output, even an empty directory or a dead link, stays as it is."""
    output = tmp_path / "out"
    make(output)
    before = output.lstat()
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, output)
    assert_clear(caught.value, str(output))
    assert "--overwrite" in caught.value.hint
    assert (output.lstat().st_ino, output.lstat().st_mtime_ns) == (
        before.st_ino, before.st_mtime_ns)  # fmt: skip
    assert beside(output) == []


def test_overwrite_replaces_everything(tmp_path: Path, base: Path, lora: Path) -> None:
    """After --overwrite the new model is there alone: no shard, no file of the old one."""
    output = tmp_path / "out"
    loratool.merge(BASE, ADAPTER, output)
    (output / "notes").mkdir()
    (output / "notes" / "a.txt").write_text("old")
    loratool.merge(base, lora, output, overwrite=True)
    loratool.merge(base, lora, tmp_path / "fresh")
    assert sha256s(output) == sha256s(tmp_path / "fresh")
    assert not (output / "notes").exists()
    assert beside(output) == []


def test_an_empty_directory_may_be_overwritten(tmp_path: Path, base: Path, lora: Path) -> None:
    """--overwrite on an empty directory loses nothing, so it goes ahead."""
    (tmp_path / "out").mkdir()
    loratool.merge(base, lora, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


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
    output, real_sync = tmp_path / "out", writer.sync

    def interfere(path: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.tex").write_text("mine")
        real_sync(path)

    monkeypatch.setattr(writer, "sync", interfere)
    with pytest.raises(OutputError):
        loratool.merge(base, lora, output)
    assert (output / "thesis.tex").read_text() == "mine"
    assert beside(output) == []


# --- an output that would harm an input ----------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True], ids=["plain", "overwrite"])
@pytest.mark.parametrize("which", ["base", "lora"])
@pytest.mark.parametrize("where", ["same", "inside", "around", "dots", "linked"])
def test_an_output_in_the_place_of_an_input_is_refused(
    tmp_path: Path, base: Path, lora: Path, which: str, where: str, overwrite: bool
) -> None:
    """Equal to, inside of or around an input, by any path: refused, and the input stays."""
    source = base if which == "base" else lora
    (tmp_path / "link").symlink_to(source)
    output = {
        "same": source,
        "inside": source / "merged",
        "around": source.parent,
        "dots": source / ".." / source.name / "deep" / "merged",
        "linked": tmp_path / "link" / "merged",
    }[where]
    before = sha256s(tmp_path / "in")
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, output, overwrite=overwrite)
    assert_clear(caught.value, str(tmp_path / "in"))
    assert sha256s(tmp_path / "in") == before
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["base", "lora"]


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_given_as_a_file_is_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, which: str
) -> None:
    """The directory around an input file cannot be the output, not even with --overwrite."""
    file = base / "model.safetensors" if which == "base" else lora / "adapter_model.safetensors"
    inputs = (file, lora) if which == "base" else (base, file)
    (lora / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        loratool.merge(*inputs, file.parent, overwrite=True)
    assert file.is_file()


@pytest.mark.parametrize("which", ["base", "lora"])
def test_files_that_an_input_links_to_are_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, which: str
) -> None:
    """A directory that holds the targets of an input's links is an input as well."""
    source = base if which == "base" else lora
    real = tmp_path / "real"
    real.mkdir()
    (real / "loratool.json").write_text("{}")  # a model directory for --overwrite
    for path in sorted(source.iterdir()):
        shutil.move(path, real / path.name)
        path.symlink_to(real / path.name)
    before = sha256s(real)
    with pytest.raises(OutputError):
        loratool.merge(base, lora, real, overwrite=True)
    assert sha256s(real) == before


# --- killed and interrupted ----------------------------------------------------------------------


def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    """SIGKILL in mid-write: no output, inputs unharmed; the next run removes what was left."""
    base = large_base(tmp_path / "base", 64, shards=4)
    lora, output = large_lora(tmp_path / "lora"), tmp_path / "out"
    before = sha256s(base)
    process = start_merge(base, lora, output, paused(20_000_000, tmp_path / "go"))
    wait_for(lambda: size_of_partials(output) > 20_000_000, process)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    assert len(beside(output)) == 1
    assert size_of_partials(output) < 60_000_000  # it was not done
    assert sha256s(base) == before

    loratool.merge(base, lora, output)
    assert beside(output) == []
    provenance = json.loads((output / "loratool.json").read_text())
    assert provenance["shards"] == {p.name: digest(p) for p in output.glob("*.safetensors")}
    assert load(output).keys() == load(base).keys()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


#: Writes slowly, and as slowly flushes what it has written.
SLOW = {
    "writing": "options['progress'] = lambda *a: time.sleep(0.1)",
    "flushing": "import loratool.storage.staging as w\nw.sync = lambda p: time.sleep(0.5)",
}


@pytest.mark.parametrize("phase", SLOW)
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, phase: str) -> None:
    """SIGINT (Ctrl-C), while it writes or while it finishes, ends a run soon with nothing left."""
    base, lora = large_base(tmp_path / "base", 12), large_lora(tmp_path / "lora")
    output = tmp_path / "out"
    process = start_merge(base, lora, output, SLOW[phase])
    if phase == "writing":
        wait_for(lambda: size_of_partials(output) > 2_000_000, process)
    else:
        wait_for(lambda: bool(list(tmp_path.glob(".out*/loratool.json"))), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert_clean(output)


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    """A second run for the same output finishes while the first one's files stay; the first then
    finds the output taken, and does not replace it."""
    base, lora = large_base(tmp_path / "base", 8), large_lora(tmp_path / "lora")
    output, go = tmp_path / "out", tmp_path / "go"
    process = start_merge(base, lora, output, paused(2_000_000, go))
    wait_for(lambda: size_of_partials(output) > 2_000_000, process)
    partial, size = beside(output), size_of_partials(output)
    loratool.merge(base, lora, output)
    assert process.poll() is None
    assert beside(output) == partial
    assert size_of_partials(output) >= size
    before = output.stat().st_ino
    go.touch()
    out, _ = process.communicate(timeout=30)
    assert beside(output) == []
    assert output.stat().st_ino == before
    assert json.loads(out)["kind"] == "OutputError"


def test_leftovers_are_told_from_company(tmp_path: Path, base: Path, lora: Path) -> None:
    """What a dead run for this output left is removed, what a living one has made is not, nor
    what belongs to another output."""
    dead, foreign = tmp_path / ".out.loratool-partial-dead", tmp_path / ".o.loratool-partial-dead"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    with StagedDirectory(tmp_path / "out") as alive:
        assert not dead.exists()
        (alive.path / "model.safetensors").write_bytes(b"x")
        dead.mkdir()
        loratool.merge(base, lora, tmp_path / "out")
        assert not dead.exists()
        assert (alive.path / "model.safetensors").read_bytes() == b"x"
    assert (foreign / "model.safetensors").is_file()


def test_a_run_that_is_finishing_is_company_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock holds until the output is in place, so nobody removes it while it is flushed."""
    output = tmp_path / "out"
    real_sync = writer.sync
    entered: list[bool] = []

    def sync_with_company(path: Path) -> None:
        if not entered:
            entered.append(True)
            with StagedDirectory(output):
                pass
        real_sync(path)

    monkeypatch.setattr(writer, "sync", sync_with_company)
    with StagedDirectory(output) as staged:
        (staged.path / "model.safetensors").write_bytes(b"whole")
        staged.commit()
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


# --- full and forbidden disks --------------------------------------------------------------------


def open_files(below: Path) -> list[str]:
    """What this process has open below a directory."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(below))]


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
    monkeypatch.setattr("loratool.merging.output.free_bytes", lambda _: 1 << 40)
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, place / "out")
    assert_clear(caught.value, "disk is full", str(place))
    assert "partial" not in caught.value.message  # which is gone by now
    assert os.listdir(place) == before
    assert open_files(place) == []


def test_a_limit_on_file_size_is_named(tmp_path: Path) -> None:
    """RLIMIT_FSIZE (ulimit -f), which stops writing everywhere, ends the run in words."""
    base, lora = large_base(tmp_path / "base", 4), large_lora(tmp_path / "lora")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {1 << 20}))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    code, error, _ = child_merge(base, lora, tmp_path / "out", limit)
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
    """An output name that the file system does not allow is an OutputError, with nothing left."""
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, lora, tmp_path / ("x" * 250))
    assert isinstance(caught.value, OutputError)
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


def test_progress_ends_at_the_total(tmp_path: Path, base: Path, lora: Path) -> None:
    """Progress grows to exactly the bytes announced, so that a bar ends full."""
    calls: list[tuple[int, int, str]] = []
    report = loratool.merge(base, lora, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert calls[-1] == (report.bytes_written, report.bytes_written, "model.safetensors")


def test_a_name_with_the_tensor_norm_is_the_same_in_and_out(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """With dtype base, tensors that the adapter does not touch keep every bit."""
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    untouched = {OTHER, NORM}
    merged = load(tmp_path / "out")
    assert same({n: merged[n] for n in untouched}, {n: small_state()[n] for n in untouched})


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
