"""What a cluster's tasks make is what one run makes: bytes, reports, and progress to the end."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.extracting import Pair, model, moved
from helpers.outcomes import beside, sha256s
from helpers.places import FIXTURES
from helpers.quantised import llama_state, write_nf4_base
from helpers.verifying import Q, flipped, merged, written

import loratool
from loratool.streams.cluster import Cluster, ClusterCall
from loratool.verbs.inspecting import inspect_all

ray_helpers = pytest.importorskip("helpers.ray")

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


class Calls:
    """What was sent to a cluster."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[ClusterCall] = []
        results = Cluster.results

        def spied(cluster: Cluster, function: Any, calls: Sequence[ClusterCall]) -> Iterator[Any]:
            self.sent += calls
            return results(cluster, function, calls)

        patch.setattr(Cluster, "results", spied)

    def assert_light(self, count: int) -> None:
        """So many, of paths and words, each with its memory."""
        assert len(self.sent) == count
        for call in self.sent:
            assert len(pickle.dumps(call.arguments)) < 20_000
            assert 500_000_000 < call.memory < 8_000_000_000
            assert not list(_arrays(call.arguments))


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray | torch.Tensor | bytes | bytearray | memoryview):
        yield value
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _arrays(one)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _arrays(vars(value))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def plain(report: Any) -> dict[str, Any]:
    """A report without what differs between two runs of anything."""
    found: dict[str, Any] = report.to_dict()
    for name in ("seconds", "output", "bytes_free"):
        found.pop(name, None)
    return found


def assert_same(alone: Path, spread: Path) -> None:
    assert sha256s(spread) == sha256s(alone)
    assert beside(spread) == []


def test_merge_and_unmerge_make_the_same_bytes(nodes: Any, calls: Calls, tmp_path: Path) -> None:
    """A reversible, verified merge and its unmerge by the undo file, each shard by a task."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    want = loratool.merge(BASE, ADAPTER, alone, reversible=True, verify=True)
    seen = ray_helpers.Seen()
    have = loratool.merge(
        BASE, ADAPTER, spread, reversible=True, verify=True, ray=nodes.address, progress=seen
    )
    assert_same(alone, spread)
    assert plain(have) == plain(want)
    seen.assert_complete()
    calls.assert_light(3)
    seen = ray_helpers.Seen()
    back = tmp_path / "back"
    assert loratool.unmerge(spread, ADAPTER, back, ray=nodes.address, progress=seen).exact
    for path in BASE.glob("*.safetensors"):
        assert (back / path.name).read_bytes() == path.read_bytes()
    seen.assert_complete()
    calls.assert_light(6)


def test_tasks_know_what_a_merge_was_told(nodes: Any, tmp_path: Path) -> None:
    """Parts, weights of layers and other shards, in a merge and in the proof of it."""
    told: dict[str, Any] = {"exclude": "k_proj", "weights": ["0.5,2@layers.1"]}
    outs = [tmp_path / "alone", tmp_path / "spread"]
    loratool.merge(BASE, ADAPTER, outs[0], max_shard_size="200kB", **told)
    loratool.merge(BASE, ADAPTER, outs[1], max_shard_size="200kB", ray=nodes.address, **told)
    assert_same(*outs)
    assert loratool.verify(outs[1], BASE, ADAPTER, ray=nodes.address, **told).verdict == "yes"
    assert loratool.verify(outs[1], BASE, ADAPTER, ray=nodes.address).verdict == "no"


def test_subtraction_makes_the_same_bytes(nodes: Any, calls: Calls, tmp_path: Path) -> None:
    """unmerge --subtract, each shard by a task."""
    held = tmp_path / "held"
    loratool.merge(BASE, ADAPTER, held)
    outs = [tmp_path / "alone", tmp_path / "spread"]
    seen = ray_helpers.Seen()
    want = loratool.unmerge(held, ADAPTER, outs[0], subtract=True)
    have = loratool.unmerge(held, ADAPTER, outs[1], subtract=True, ray=nodes.address, progress=seen)
    assert_same(*outs)
    assert plain(have) == plain(want)
    seen.assert_complete()
    calls.assert_light(3)


def test_dequantise_makes_the_same_bytes(nodes: Any, calls: Calls, tmp_path: Path) -> None:
    """A base in NF4, each shard by a task."""
    packed = tmp_path / "packed"
    write_nf4_base(packed, llama_state(layers=3), shard_of=lambda name: len(name) % 3)
    outs = [tmp_path / "alone", tmp_path / "spread"]
    seen = ray_helpers.Seen()
    want = loratool.dequantise(packed, outs[0])
    have = loratool.dequantise(packed, outs[1], ray=nodes.address, progress=seen)
    assert_same(*outs)
    assert plain(have) == plain(want)
    seen.assert_complete()
    calls.assert_light(len(want.shards))


@pytest.mark.parametrize("right", [True, False])
def test_verify_says_the_same(nodes: Any, calls: Calls, tmp_path: Path, right: bool) -> None:
    """The report of a model that is base + adapter, and of one with a wrong bit."""
    state = merged()
    if not right:
        state[Q] = flipped(state[Q], 12, 7)
    folder = written(tmp_path / "model", state)
    want = loratool.verify(folder, BASE, [ADAPTER])
    seen = ray_helpers.Seen()
    have = loratool.verify(folder, BASE, [ADAPTER], ray=nodes.address, progress=seen)
    assert plain(have) == plain(want)
    assert have.verdict == ("yes" if right else "no")
    calls.assert_light(4)
    if right:
        seen.assert_complete()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3, "save": ["norms"]},
        {"budget": "12KB", "patterns": True, "verify": True, "embeddings": True},
    ],
)
def test_extract_makes_the_same_bytes(
    nodes: Any, calls: Calls, tmp_path: Path, options: dict[str, Any]
) -> None:
    """An adapter of matrices that tasks took apart; a budget asks for several passes."""
    before = model(24)
    pair = Pair(tmp_path, before, moved(before, decay=0.9))
    want = loratool.extract(pair.base, pair.tuned, tmp_path / "alone", **options)
    seen = ray_helpers.Seen()
    have = loratool.extract(
        pair.base, pair.tuned, tmp_path / "spread", ray=nodes.address, progress=seen, **options
    )
    assert_same(tmp_path / "alone", tmp_path / "spread")
    assert plain(have) == plain(want)
    seen.assert_complete()
    calls.assert_light(len(calls.sent))
    assert len(calls.sent) > 4


def test_inspect_says_the_same_of_many(
    nodes: Any, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters by absolute and relative paths, a damaged one and one that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near").symlink_to(ADAPTER)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"no header")
    sources = [str(ADAPTER), "near", "bad", "missing.safetensors"]
    options = {"base": BASE, "spectrum": True}
    want = [_found(*one) for one in inspect_all(sources, options)]
    have = [_found(*one) for one in inspect_all(sources, options, nodes.address)]
    assert have == want
    assert [error for _, error, _ in want] == [None, None, "FileError", "FileError"]
    calls.assert_light(4)


def _found(source: Any, report: Any) -> tuple[str, str | None, dict[str, Any]]:
    kind = type(report).__name__ if isinstance(report, loratool.LoraToolError) else None
    return str(source), kind, report.to_dict()


def test_a_path_after_ray_is_refused_in_words(tmp_path: Path) -> None:
    """`--ray some/path` does not take a path for an address."""
    done = run_cli("merge", BASE, "--ray", ADAPTER, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "is not the address of a Ray cluster" in done.stderr
    assert "--ray=local" in done.stderr
    with pytest.raises(loratool.LoraToolError, match="not the address"):
        list(inspect_all(["a"], {}, "some/path"))


def test_inspect_of_a_bad_one_among_many_exits_with_its_code(nodes: Any, tmp_path: Path) -> None:
    """`inspect A B --json --ray ADDRESS` prints both and exits 1; one document on stdout."""
    done = run_cli("inspect", ADAPTER, tmp_path / "none", "--json", "--ray", nodes.address)
    assert done.exit_code == 1
    assert done.stderr == ""
    first, second = json.loads(done.stdout)["adapters"]
    assert first["format"] == "peft"
    assert second["error"] == "bad-file"
