"""Errors from every kind of system call, and signals at every step of an overwrite."""

from __future__ import annotations

import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import faults
from helpers.files import small_lora, small_state, write_base
from helpers.outcomes import beside, sha256s

import loratool
from loratool.errors import LoraToolError


class Place:
    """A folder with a base, an adapter, and the output of an earlier merge, in another dtype."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parent"
        self.base = write_base(self.folder / "base", small_state())
        (self.base / "tokenizer.json").write_text("{}")
        self.lora = small_lora(self.folder / "lora")
        self.out = self.folder / "out"
        loratool.merge(self.base, self.lora, folder / "new")
        loratool.merge(self.base, self.lora, folder / "old", dtype="float32")
        self.new, self.old = sha256s(folder / "new"), sha256s(folder / "old")
        self._source = folder / "old"
        self.inputs = sha256s(self.base) | sha256s(self.lora)
        self.command = ["merge", str(self.base), str(self.lora), "-o", str(self.out), "--overwrite"]

    def reset(self) -> None:
        """The earlier output is in its place, and nothing else is."""
        for leftover in (self.out, *(self.folder / name for name in beside(self.out))):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self._source, self.out)

    def check_truth(self, code: int, said: str) -> None:
        """The output is the old or the new one, whole, and what was said of it is so."""
        assert "Traceback" not in said
        found = sha256s(self.out)
        assert found in (self.old, self.new), said
        complete = found == self.new
        if code == 0:
            assert complete
            assert bool(beside(self.out)) == ("[old-output]" in said)
        elif code == 1:
            assert said.count("error:") == 1
            assert complete == ("is complete and in its place" in said), said
            assert complete or beside(self.out) == []
        assert sha256s(self.base) | sha256s(self.lora) == self.inputs

    def check_next(self) -> None:
        """The next run succeeds, and removes what was left."""
        loratool.merge(self.base, self.lora, self.out, overwrite=True)
        assert sha256s(self.out) == self.new
        assert beside(self.out) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.build(tmp_path_factory.mktemp("library"))


@pytest.mark.parametrize("kind", [kind for kind in faults.ERRORS if kind != "chmod"])
def test_a_failing_call_leaves_the_old_or_the_new_output(
    place: Place, library: Path, kind: str
) -> None:
    """Whichever call of a kind fails, the output is whole, and what is said of it is true."""
    place.reset()
    ended, counts = faults.count_calls(library, place.command, place.folder)
    assert ended.code == 0
    count = counts[kind]
    assert count
    few = (
        {1, count // 3, 2 * count // 3, count - 1, count} if kind in _MANY else range(1, count + 1)
    )
    for number in sorted({n for n in few if n > 0}):
        place.reset()
        ended = faults.run_failing(library, place.command, place.folder, kind, number)
        place.check_truth(ended.code, ended.err)
    place.check_next()


#: Kinds of which there are many calls: some of each are made to fail here, all in a long run.
_MANY = {"open", "stat", "read", "list"}


@pytest.mark.hostile
@pytest.mark.parametrize("kind", sorted(_MANY))
def test_every_failing_call_leaves_the_old_or_the_new_output(
    place: Place, library: Path, kind: str
) -> None:
    """The same for all calls of the kinds that have many."""
    place.reset()
    _, counts = faults.count_calls(library, place.command, place.folder)
    for number in range(1, counts[kind] + 1):
        place.reset()
        ended = faults.run_failing(library, place.command, place.folder, kind, number)
        place.check_truth(ended.code, ended.err)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "number", "steps"),
    [(*moment, "one") for moment in faults.MOMENTS] + [(*m, "two") for m in faults.TWO_STEPS],
)
def test_a_signal_leaves_the_old_or_the_new_output(
    place: Place, name: str, number: int, steps: str, when: str
) -> None:
    """SIGKILL, Ctrl-C and a polite kill beside every step of an overwrite: the old or the new
    output is in its place, or the next command that is given its path puts it there."""
    for which in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        place.reset()
        ended = faults.run_signalled(place.command, place.folder, name, number, when, which, steps)
        killed = which == signal.SIGKILL
        assert ended.code == (-which if killed else 130), ended
        if killed and steps == "two" and not place.out.exists():
            with suppress(LoraToolError):  # of a merged model there is nothing to inspect
                loratool.inspect(place.out)
        assert killed or place.out.is_dir()
        place.check_truth(ended.code, ended.err)
        if not killed:
            complete = sha256s(place.out) == place.new
            assert complete == (f"{place.out} is complete" in ended.err), ended.err
            left = "finished and wait in" in ended.err
            assert beside(place.out) == ([".out.loratool-work"] if left else [])
        place.check_next()
