"""A run that was killed goes on where it was, and gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.digests import blake3_of
from helpers.files import write_base
from helpers.forked import Ended, run_snippet
from helpers.merging import large_lora
from helpers.outcomes import beside, sha256s
from helpers.places import FIXTURES
from helpers.processes import start_merge, wait_for
from helpers.quantised import llama_state, write_nf4_base

import loratool
from loratool.errors import LoraToolError, OutputError
from loratool.storage.workfolder import WorkFolder
from loratool.storage.worksites import work_of

BASE, ADAPTER, TUNED = (str(FIXTURES / name) for name in ("base", "adapter", "tuned"))

#: Kills its own process after some seconds; every write takes a little longer, so that there is
#: something to stop.
KILLED = """
import os, signal, sys, threading, time
import loratool.storage.shardfile as shardfile
seconds, *arguments = sys.argv[1:]
write = shardfile.ShardWriter.write
def slowly(self, offset, data):
    time.sleep(0.001)
    write(self, offset, data)
shardfile.ShardWriter.write = slowly
if float(seconds):
    threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
from loratool.cli.main import main
main(arguments)
"""


class Disturbed:
    """A command that is killed at random moments, again and again, until it is through."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.command = folder, command
        self.wanted = self._run(folder / "undisturbed")
        self.seconds = min(self._timed(folder / f"timed{n}") for n in range(2))
        self.taken_up = self.kills = 0

    def _ask(self, output: Path, seconds: float = 0.0) -> Ended:
        told = [str(seconds), *self.command, "-o", str(output)]
        return run_snippet(KILLED, told, os.environ, self.folder)

    def _run(self, output: Path) -> dict[str, str]:
        ended = self._ask(output)
        assert ended.code == 0, ended
        return sha256s(output)

    def _timed(self, output: Path) -> float:
        begun = os.times().elapsed
        self._run(output)
        return os.times().elapsed - begun

    def try_once(self, seed: int) -> None:
        """Kill it up to four times; then let it end, and compare."""
        chance, output = random.Random(seed), self.folder / f"out{seed}"
        for _ in range(4):
            ended = self._ask(output, chance.uniform(0.01, 1.1 * self.seconds))
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended
            self.kills += 1
            if output.is_dir():  # killed after the last step
                assert sha256s(output) == self.wanted
                shutil.rmtree(output)
                for left in beside(output):  # what the next run for this output would clear away
                    assert left.startswith(f".{output.name}.loratool-")
                    shutil.rmtree(output.with_name(left))
                return
            self._check_entries(output)
        else:
            ended = self._ask(output)
            assert ended.code == 0, ended
        self.taken_up += "[taken-up]" in ended.err
        assert sha256s(output) == self.wanted
        assert beside(output) == []
        shutil.rmtree(output)

    def _check_entries(self, output: Path) -> None:
        """What is said to be finished is, whole."""
        work = work_of(output)
        for entry in work.glob("done/*.json"):
            said = json.loads(entry.read_text())
            name = entry.name.removesuffix(".json")
            (file,) = [*work.glob(f"output/{name}"), *work.glob(f"finishing-*/{name}"),
                       *([output / name] if (output / name).is_file() else [])]  # fmt: skip
            assert blake3_of(file.read_bytes()) == said["digest"]


def commands(folder: Path) -> dict[str, tuple[str, ...]]:
    merged = str(folder / "merged")
    write_nf4_base(folder / "nf4", llama_state())
    loratool.merge(BASE, ADAPTER, merged, reversible=True)
    return {
        "merge": ("merge", BASE, ADAPTER, "--reversible"),
        "unmerge": ("unmerge", merged, ADAPTER),
        "subtract": ("unmerge", merged, ADAPTER, "--subtract"),
        "dequantise": ("dequantise", str(folder / "nf4")),
        "extract": ("extract", BASE, TUNED, "--rank", "8"),
        "convert": ("convert", ADAPTER, "--to", "mlx"),
    }


NAMES = ("merge", "unmerge", "subtract", "dequantise", "extract", "convert")


@pytest.mark.parametrize("name", ["merge", "extract"])
def test_a_run_that_is_killed_at_random_moments_goes_on(tmp_path: Path, name: str) -> None:
    """Killed again and again, the same command ends with the bytes of an undisturbed one."""
    disturbed = Disturbed(tmp_path, *commands(tmp_path)[name])
    for seed in range(2):
        disturbed.try_once(seed)
    assert disturbed.kills


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_kills(tmp_path: Path, name: str) -> None:
    """The same at a hundred random moments, after some of which finished files are taken up."""
    disturbed = Disturbed(tmp_path, *commands(tmp_path)[name])
    seed = 100
    while disturbed.kills < 100:
        disturbed.try_once(seed)
        seed += 1
    assert disturbed.taken_up or name == "convert"


# ---------------------------------------------------------------------------- one thing at a time


class Counted:
    """A merge in this process that stops after some shards, by an exception of the caller's."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.base, self.lora, self.output = BASE, ADAPTER, folder / "out"
        self.options = options
        self.made: list[str] = []

    def stop_in(self, number: int) -> None:
        """Merge until so many shards are finished, and another one is begun."""

        def progress(done: int, total: int, name: str) -> None:
            if name.startswith(f"model-0000{number + 1}"):
                while len(list((work_of(self.output) / "done").iterdir())) < number:
                    time.sleep(0.001)  # what is finished is flushed beside the work
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loratool.merge(self.base, self.lora, self.output, progress=progress, **self.options)

    def go_on(self, **more: Any) -> loratool.MergeReport:
        """Merge to the end; `made` are the shards that were written for it."""
        self.made = []
        publish = WorkFolder.publish

        def noted(work: WorkFolder, name: str, *others: Any) -> None:
            self.made.append(name)
            publish(work, name, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WorkFolder, "publish", noted)
            return loratool.merge(self.base, self.lora, self.output, **{**self.options, **more})


SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, str]:
    loratool.merge(BASE, ADAPTER, tmp_path / "wanted")
    return sha256s(tmp_path / "wanted")


def codes(report: loratool.MergeReport) -> list[str]:
    return [notice.code for notice in report.warnings]


def test_what_is_finished_is_taken_up_and_said(tmp_path: Path, wanted: dict[str, str]) -> None:
    """After Ctrl-C in the third of three shards the next run makes only that one."""
    merge = Counted(tmp_path)
    merge.stop_in(2)
    assert sorted(p.name for p in (work_of(merge.output) / "output").iterdir()) == SHARDS[:2]
    assert not list(work_of(merge.output).glob("by-*"))
    report = merge.go_on()
    assert merge.made == SHARDS[2:]
    (said,) = [n for n in report.warnings if n.code == "taken-up"]
    assert "2 of 3 files" in said.message
    assert "--restart" in said.message
    assert sha256s(merge.output) == wanted
    assert beside(merge.output) == []


def test_restart_makes_everything_again(tmp_path: Path, wanted: dict[str, str]) -> None:
    merge = Counted(tmp_path)
    merge.stop_in(2)
    report = merge.go_on(restart=True)
    assert merge.made == SHARDS
    assert not {"taken-up", "begun-anew"} & set(codes(report))
    assert sha256s(merge.output) == wanted


def touched(folder: Path) -> None:
    shard = folder / SHARDS[0]
    os.utime(shard, ns=(1, os.stat(shard).st_mtime_ns + 1))


def reweighed(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 8}))


DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[Path, Path], None], str]] = {
    "dtype": ({"dtype": "bfloat16"}, lambda base, lora: None, "options, dtype"),
    "weight": ({"weights": [0.5]}, lambda base, lora: None, "options, weights"),
    "reversible": ({"reversible": True}, lambda base, lora: None, "reversible"),
    "base touched": ({}, lambda base, lora: touched(base), SHARDS[0]),
    "adapter changed": ({}, lambda base, lora: reweighed(lora), "adapter_config.json"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_run_that_differs_says_in_what_and_begins_anew(tmp_path: Path, what: str) -> None:
    """Nothing of another merge gets into the output, and nobody wonders why it takes so long."""
    more, change, said = DIFFERENT[what]
    merge = Counted(tmp_path)
    merge.base = str(shutil.copytree(BASE, tmp_path / "base"))
    merge.lora = str(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    merge.stop_in(2)
    change(Path(merge.base), Path(merge.lora))
    report = merge.go_on(**more)
    assert merge.made == SHARDS
    (notice,) = [n for n in report.warnings if n.code == "begun-anew"]
    assert said in notice.message
    loratool.merge(merge.base, merge.lora, tmp_path / "again", **more)
    assert sha256s(merge.output) == sha256s(tmp_path / "again")


def test_another_version_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = Counted(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("loratool.merging.provenance.__version__", "0.0.1")
        merge.stop_in(2)
    report = merge.go_on()
    assert merge.made == SHARDS
    (notice,) = [n for n in report.warnings if n.code == "begun-anew"]
    assert 'versions, loratool: "0.0.1", not' in notice.message


SPOILT: dict[str, Callable[[Path, Path], None]] = {
    "shorter": lambda shard, entry: os.truncate(shard, shard.stat().st_size - 1),
    "another bit": lambda shard, entry: shard.write_bytes(
        bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:]
    ),
    "gone": lambda shard, entry: shard.unlink(),
    "no entry": lambda shard, entry: entry.unlink(),
    "half an entry": lambda shard, entry: os.truncate(entry, 20),
    "an entry of another kind": lambda shard, entry: entry.write_text('{"nbytes": "many"}'),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_not_whole_is_made_again(tmp_path: Path, wanted: dict[str, str], how: str) -> None:
    """A finished file that is not what its entry says counts for nothing."""
    merge = Counted(tmp_path)
    merge.stop_in(2)
    work = work_of(merge.output)
    SPOILT[how](work / "output" / SHARDS[0], work / "done" / f"{SHARDS[0]}.json")
    merge.go_on()
    assert merge.made == [SHARDS[0], SHARDS[2]]
    assert sha256s(merge.output) == wanted


def test_files_that_were_copied_elsewhere_and_back_are_known_by_their_hash(
    tmp_path: Path, wanted: dict[str, str]
) -> None:
    """Times of change do not survive every copy; what is in the files does."""
    merge = Counted(tmp_path)
    merge.stop_in(2)
    work = work_of(merge.output)
    shutil.copytree(work, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree(work)
    os.rename(tmp_path / "elsewhere", work)
    merge.go_on()
    assert merge.made == SHARDS[2:]
    assert sha256s(merge.output) == wanted


def test_strangers_in_the_folder_do_not_reach_the_output(
    tmp_path: Path, wanted: dict[str, str]
) -> None:
    merge = Counted(tmp_path)
    merge.stop_in(2)
    (work_of(merge.output) / "output" / "notes.txt").write_text("mine")
    (work_of(merge.output) / "output" / "sub").mkdir()
    merge.go_on()
    assert sha256s(merge.output) == wanted


def test_verify_checks_what_an_earlier_run_did_not(tmp_path: Path) -> None:
    """Shards that were finished without --verify are checked when they are taken up."""
    merge = Counted(tmp_path)
    merge.stop_in(2)
    checked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        from loratool.merging.proof import pairing

        real = pairing.check_written
        patch.setattr(
            pairing, "check_written",
            lambda shards, *o: (checked.extend(s.name for s in shards), real(shards, *o)),
        )  # fmt: skip
        merge.go_on(verify=True)
    assert checked == SHARDS


def test_errors_leave_nothing(tmp_path: Path) -> None:
    """What is wrong with the input stays wrong: finished shards of it are of no use to anybody."""
    import torch

    state = {"a.weight": torch.ones(4, 4)}
    bad = {"b.weight": torch.full((4, 4), float("nan"))}
    base = write_base(tmp_path / "base", state, bad)
    lora = large_lora(tmp_path / "lora")
    with pytest.raises(LoraToolError):
        loratool.merge(base, lora, tmp_path / "out", allow_unmatched=True)
    assert beside(tmp_path / "out") == []


def test_another_verb_for_the_same_output_takes_its_place(
    tmp_path: Path, wanted: dict[str, str]
) -> None:
    """The folder of a stopped merge does not stay for ever where another output takes its name."""
    merge = Counted(tmp_path)
    merge.stop_in(2)
    loratool.resize(ADAPTER, merge.output, rank=4)
    assert beside(merge.output) == []
    shutil.rmtree(merge.output)
    merge.stop_in(2)
    report = loratool.convert(ADAPTER, merge.output, to="mlx")
    assert "begun-anew" in [n.code for n in report.warnings]
    assert beside(merge.output) == []


@pytest.mark.process
def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """Also where the first has finished shards already."""
    go = tmp_path / "go"
    prelude = (
        "def progress(done, total, label):\n"
        f"    while '00003' in label[:11] and not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "options['progress'] = progress"
    )
    process = start_merge(Path(BASE), Path(ADAPTER), tmp_path / "out", prelude)
    done = work_of(tmp_path / "out") / "done"
    wait_for(lambda: len(list(done.glob("*.json"))) == 2, process)
    for options in ({}, {"restart": True}, {"dtype": "base"}):
        with pytest.raises(OutputError, match="Another run is writing"):
            loratool.merge(BASE, ADAPTER, tmp_path / "out", **options)
    go.touch()
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What this process left for the next one, as Ctrl-C tells it, is of one test."""
    from loratool.storage import presence

    presence._LEFT.clear()
    yield
    presence._LEFT.clear()
