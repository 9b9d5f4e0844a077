"""What a stopped run, or another process, has computed is taken up, and nothing tells of it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.extracting import Q0, Pair, model, moved, random_for
from helpers.outcomes import assert_clean, sha256s
from helpers.processes import start_python
from hypothesis import given
from hypothesis import strategies as st

import loratool
import loratool.verbs.extracting as verb
from loratool.errors import ValueRangeError
from loratool.extracting.decomposed import Decomposed
from loratool.extracting.decomposition import Extraction
from loratool.extracting.difference import Size
from loratool.storage.worksites import work_of
from loratool.streams.results import ResultLog
from loratool.streams.shares import WorkShare

#: Options that lead to one pass by rank, one by energy, and to several for a budget.
WAYS: list[dict[str, Any]] = [
    {"rank": 3, "save": ["norms", "biases"]},
    {"energy": 0.8, "patterns": True, "dtype": "bfloat16"},
    {"budget": "16KB", "patterns": True, "verify": True, "embeddings": True},
]
BUDGET = WAYS[2]


def everything(folder: Path) -> Pair:
    """A tied model with a stack of experts, of which one did not change, norms and biases."""
    stack = "model.layers.0.block_sparse_moe.input_linear.weight"
    state = {n: t for n, t in model(24, layers=1).items() if n != "lm_head.weight"}
    state |= {stack: random_for("e", 3, 20, 12).float()}
    tuned = moved(state, decay=0.9)
    # One expert did not change, and one matrix has less than any rank that is asked for.
    tuned[stack][1] = state[stack][1]
    tuned[f"{Q0}.weight"] = moved(state, f"{Q0}.weight", rank=1)[f"{Q0}.weight"]
    # And one changed so much that a budget gives it most of its ranks.
    large = "model.layers.0.mlp.up_proj.weight"
    tuned[large] = state[large] + 20 * (tuned[large] - state[large])
    return Pair(folder, state, tuned, tie_word_embeddings=True, model_type="granitemoe")


class Runs:
    """Extractions of one pair that have a log beyond the run; and what they compute, by name."""

    def __init__(self, pair: Pair, patch: pytest.MonkeyPatch) -> None:
        self.pair = pair
        self.computed: list[str] = []
        self._patch = patch
        for name in ("_measured", "_decomposed"):
            self._watch(name, getattr(Extraction, name))

    def _watch(self, name: str, call: Callable[..., Any]) -> None:
        def watched(work: Extraction, part: Any, *criterion: Any) -> Any:
            self.computed.append(part.name)
            return call(work, part, *criterion)

        self._patch.setattr(Extraction, name, watched)

    def extract(self, log: Path | None, **options: Any) -> tuple[Any, Any]:
        """The files and the report of a run that takes up `log` and goes on with it."""
        self.computed.clear()
        self._patch.setattr(verb, "ResultLog", lambda folder: ResultLog(log or folder))
        report = self.pair.extract(**options).to_dict()
        report.pop("seconds")
        report["warnings"] = [w for w in report["warnings"] if w["code"] != "taken-up"]
        return sha256s(self.pair.out), report

    def begun(self, worker: str, **options: Any) -> list[str]:
        """What a worker computes, here the last one, which writes the adapter too."""
        self.computed.clear()
        self._patch.undo()
        self._patch.setattr(verb, "ResultLog", ResultLog)
        for name in ("_measured", "_decomposed"):
            self._watch(name, getattr(Extraction, name))
        report = self.pair.extract(worker=worker, **options)
        assert report.share is not None
        assert report.share.complete
        return [*self.computed]

    def begin(self, log: Path, number: int, count: int, **options: Any) -> list[str]:
        """What worker `number` of `count` does before another process writes the adapter."""
        self.computed.clear()
        self._patch.setattr(verb, "ResultLog", lambda folder: ResultLog(log))
        share = WorkShare(number, count, completes=False)
        report = self.pair.extract(worker=share, **options)
        assert report.share is not None
        assert not report.share.complete
        shutil.rmtree(work_of(self.pair.out))
        return [*self.computed]


def boundaries(data: bytes) -> list[int]:
    """Where records end, by the format that streams/results.py describes."""
    ends = [0]
    while ends[-1] < len(data):
        _, head, length = struct.unpack_from("<8sIQ", data, ends[-1])
        ends.append(ends[-1] + 20 + head + length + 32)
    return ends


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(everything(tmp_path), monkeypatch)


def logged(runs: Runs, folder: Path, options: dict[str, Any]) -> tuple[Any, list[str], bytes]:
    """What an undisturbed run makes, what it computes, and the log it leaves."""
    plain = runs.extract(None, **options)
    computed = [*runs.computed]
    assert runs.extract(folder, **options) == plain
    assert sorted(runs.computed) == sorted(computed)
    (path,) = folder.iterdir()
    return plain, computed, path.read_bytes()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_run_goes_on_after_any_result(
    tmp_path: Path, runs: Runs, options: dict[str, Any]
) -> None:
    """Stopped after any of the results, the next run computes the others only, once each, and
    writes the same files and the same report as one that nobody stopped."""
    plain, computed, data = logged(runs, tmp_path / "log", options)
    ends = boundaries(data)
    assert len(ends) == len(computed) + 1
    for count, end in enumerate(ends):
        folder = tmp_path / f"log{count}"
        folder.mkdir()
        (folder / "stopped.log").write_bytes(data[:end])
        assert runs.extract(folder, **options) == plain
        assert len(runs.computed) == len(computed) - count


def test_a_budget_asks_twice_and_both_answers_are_kept(tmp_path: Path, runs: Runs) -> None:
    """Modules that are done again with a higher rank have a result for each, told apart."""
    _, computed, _ = logged(runs, tmp_path / "log", BUDGET)
    assert len(computed) > len(set(computed))
    runs.extract(tmp_path / "log", **BUDGET)
    assert not runs.computed


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_half_a_result_does_not_count(tmp_path: Path, runs: Runs, options: dict[str, Any]) -> None:
    """Cut anywhere, or with any byte changed, what is whole of the log is taken up, no more."""
    plain, computed, data = logged(runs, tmp_path / "log", options)
    ends = boundaries(data)
    dice = random.Random(1)
    for number in range(12):
        place = dice.randrange(len(data))
        broken = bytearray(data[:place]) if number % 2 else bytearray(data)
        if number % 2 == 0:
            broken[place] ^= 1 << dice.randrange(8)
        folder = tmp_path / f"log{number}"
        folder.mkdir()
        (folder / "broken.log").write_bytes(broken)
        assert runs.extract(folder, **options) == plain, place
        whole = sum(end <= place for end in ends[1:])
        assert len(runs.computed) == len(computed) - whole


def test_results_are_not_taken_for_others(tmp_path: Path, runs: Runs) -> None:
    """Runs that share a log although they ask for something else get what they ask for."""
    every: list[dict[str, Any]] = [
        {"rank": 3}, {"rank": 4}, {"energy": 0.7}, {"energy": 0.7, "max_rank": 5}, BUDGET,
        {"rank": 3, "dtype": "bfloat16"}, {"rank": 3, "exact": True}, {"rank": 3, "seed": 5},
        {"rank": 3, "exclude": [Q0]}, {"rank": 3, "keep_noise": True},
    ]  # fmt: skip
    for options in every:
        plain = runs.extract(None, **options)
        assert runs.extract(tmp_path / "log", **options) == plain, options
    for options in every:
        runs.extract(tmp_path / "log", **options)
        assert not runs.computed, options


@pytest.mark.parametrize(
    ("first", "then"),
    [({"seed": 0}, {"seed": 7}), ({}, {"exact": True}), ({"keep_noise": True}, {})],
    ids=str,
)
def test_options_that_change_a_large_matrix_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Any, then: Any
) -> None:
    """Of a matrix whose factors depend on the seed, a change by rounding: no mistaken identity."""
    state = {f"{Q0}.weight": random_for("q", 120, 130).float()}
    state["model.layers.1.self_attn.q_proj.weight"] = random_for("r", 120, 130).float()
    tuned = moved(state, f"{Q0}.weight", decay=0.9)
    other = "model.layers.1.self_attn.q_proj.weight"
    tuned[other] = state[other].bfloat16().float()
    runs = Runs(Pair(tmp_path, state, tuned), monkeypatch)
    plain = runs.extract(None, rank=2, **then)
    before = runs.extract(tmp_path / "log", rank=2, **first)
    assert before[0]["adapter_model.safetensors"] != plain[0]["adapter_model.safetensors"]
    assert runs.extract(tmp_path / "log", rank=2, **then) == plain


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_workers_share_what_a_first_pass_computes(
    tmp_path: Path, runs: Runs, options: dict[str, Any], count: int
) -> None:
    """Each part is computed by one worker; the process that writes adds later passes only."""
    plain = runs.extract(None, **options)
    every = [*runs.computed]
    done = [runs.begin(tmp_path / "log", n, count, **options) for n in range(1, count + 1)]
    together = [name for own in done for name in own]
    assert sorted(together) == sorted(set(every))
    if count == 2:
        assert all(done)
    assert not runs.pair.out.exists()
    assert runs.extract(tmp_path / "log", **options) == plain
    assert len(runs.computed) == len(every) - len(together)


def test_a_worker_that_never_came_is_no_loss(tmp_path: Path, runs: Runs) -> None:
    """What no worker did the process that writes does itself."""
    plain = runs.extract(None, rank=3)
    runs.begin(tmp_path / "log", 2, 3, rank=3)
    assert runs.extract(tmp_path / "log", rank=3) == plain
    assert runs.computed


def test_what_is_taken_up_counts_as_done(tmp_path: Path, runs: Runs) -> None:
    """The progress of a run that computes nothing grows to the same total, by the same steps."""
    seen: list[list[tuple[int, int, str]]] = []
    for _ in range(2):
        calls: list[tuple[int, int, str]] = []
        runs.extract(tmp_path / "log", progress=lambda *call: calls.append(call), **WAYS[0])  # noqa: B023
        seen.append(calls)
    assert not runs.computed
    assert seen[0] == seen[1]
    assert seen[1][-1][0] == seen[1][-1][1]


def test_results_are_kept_as_soon_as_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that meets NaN in its last module leaves the results of all others, and no output."""
    state = model()
    tuned = moved(state)
    last = "model.layers.1.self_attn.k_proj.weight"
    tuned[last][0, 0] = float("nan")
    runs = Runs(Pair(tmp_path, state, tuned), monkeypatch)
    for _ in range(2):
        with pytest.raises(ValueRangeError, match="k_proj"):
            runs.extract(tmp_path / "log", rank=2, threads=1)
        assert_clean(runs.pair.out)
    with ResultLog(tmp_path / "log") as log:
        keys = [json.loads(key)[1] for key in log._places]
    assert last not in keys
    assert last in runs.computed
    assert not set(keys) & set(runs.computed)
    assert len(keys) >= 10


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_finish_writes_what_the_workers_were_asked_for(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """`finish` is told nothing but the output, and has the options from what the workers wrote."""
    pair = everything(tmp_path)
    pair.extract(**options)
    wanted = sha256s(pair.out)
    shutil.rmtree(pair.out)
    for number in (1, 2):
        report = pair.extract(worker=WorkShare(number, 2, completes=False), **options)
        assert report.share is not None
        assert not report.share.complete
    loratool.finish(pair.out)
    assert sha256s(pair.out) == wanted


_CHILD = """
import sys
import loratool
worker, base, tuned, out = sys.argv[1:]
loratool.extract(
    base, tuned, out, budget="16KB", patterns=True, verify=True, embeddings=True, dtype="float32",
    worker=worker,
)
"""


@pytest.mark.process
def test_two_processes_at_once(tmp_path: Path, runs: Runs) -> None:
    """Two processes that compute at the same time, then a third one that writes."""
    plain = runs.extract(None, **BUDGET)
    names = [*runs.computed]
    passes = len(names) - len(set(names))
    pair = runs.pair
    shutil.rmtree(pair.out)
    workers = [
        start_python(_CHILD, worker, pair.base, pair.tuned, pair.out) for worker in ("1/3", "2/3")
    ]
    said = [worker.communicate(timeout=100) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert len(list((work_of(pair.out) / "results").iterdir())) == 2
    mine = runs.begun("3/3", **BUDGET)
    assert sha256s(pair.out) == plain[0]
    assert len(mine) < len(set(names)) + passes


FLOATS = st.floats(allow_nan=False, min_value=0)
VALUES = st.lists(FLOATS, max_size=6).map(lambda own: np.array(own, np.float64))
SIZES = st.builds(Size, FLOATS, FLOATS, st.booleans(), FLOATS, st.booleans(), FLOATS)


@given(
    st.builds(
        Decomposed, st.none(), SIZES, VALUES, VALUES, FLOATS, FLOATS, st.none() | FLOATS,
        st.integers(0, 99), st.booleans(),
    )
)  # fmt: skip
def test_facts_come_back_exactly(found: Decomposed) -> None:
    """Through JSON and back every number of a result is the same to the last bit."""
    again = Decomposed.of(found.part, json.loads(json.dumps(found.facts)))
    for name in ("values", "following"):
        ours, theirs = getattr(found, name), getattr(again, name)
        assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
    assert repr(again) == repr(found)
