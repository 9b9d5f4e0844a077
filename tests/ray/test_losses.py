"""Tasks and nodes that are lost in the middle of a merge, and errors: nothing tells of it after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import ADAPTED, load, write_base
from helpers.merging import large_base, large_lora
from helpers.outcomes import assert_clean, beside, sha256s

import loratool
from loratool.errors import LoraToolError, ValueRangeError

ray_helpers = pytest.importorskip("helpers.ray")

SHARDS = 8


class Inputs:
    """A base in shards, an adapter, and what a run by itself makes of them."""

    def __init__(self, folder: Path) -> None:
        self.base = large_base(folder / "base", 64, SHARDS)
        self.adapter = large_lora(folder / "adapter")
        loratool.merge(self.base, self.adapter, folder / "alone", reversible=True)
        self.alone = sha256s(folder / "alone")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("what", ["task", "node"])
def test_what_is_lost_is_made_again(nodes: Any, inputs: Inputs, tmp_path: Path, what: str) -> None:
    """A task's process, or a node with all in it, is killed while it writes a shard, after another
    one was finished: the same bytes, and progress to the end."""
    out = tmp_path / "out"
    lose: Callable[..., None] = ray_helpers.kill if what == "task" else nodes.lose_node_of
    disturbance = ray_helpers.Disturbance(out, lose)
    loratool.merge(
        inputs.base, inputs.adapter, out, reversible=True, ray=nodes.address, progress=disturbance
    )
    assert disturbance.hit
    assert sha256s(out) == inputs.alone
    assert beside(out) == []
    assert disturbance.seen[-1][0] == disturbance.seen[-1][1]


def test_what_is_finished_is_taken_up(nodes: Any, inputs: Inputs, tmp_path: Path) -> None:
    """A run that ended in the middle is gone on with by tasks; its shards count as done."""
    out = tmp_path / "out"

    def stop(done: int, total: int, label: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.merge(
            inputs.base, inputs.adapter, out, reversible=True, ray=nodes.address, progress=stop
        )
    seen = ray_helpers.Seen()
    report = loratool.merge(
        inputs.base, inputs.adapter, out, reversible=True, ray=nodes.address, progress=seen
    )
    assert any(notice.code == "taken-up" for notice in report.warnings)
    seen.assert_complete()
    assert seen.shown[0][0] > 0
    assert sha256s(out) == inputs.alone


def test_a_stopped_run_does_not_bind_the_next_one(
    nodes: Any, inputs: Inputs, tmp_path: Path
) -> None:
    """After Ctrl-C no worker is thought to be there: another dtype begins anew."""
    out = tmp_path / "out"

    def stop(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.merge(inputs.base, inputs.adapter, out, ray=nodes.address, progress=stop)
    report = loratool.merge(inputs.base, inputs.adapter, out, dtype="bfloat16")
    assert any(notice.code == "begun-anew" for notice in report.warnings)
    assert beside(out) == []


def test_an_error_of_a_task_is_that_of_a_run(nodes: Any, inputs: Inputs, tmp_path: Path) -> None:
    """NaN in a shard: the same error with and without a cluster, and nothing left, also later."""
    state = load(inputs.base)
    state[ADAPTED][3, 4] = torch.nan
    names = list(state)
    parts = [{n: state[n] for n in names[i::SHARDS]} for i in range(SHARDS)]
    base = write_base(tmp_path / "base", *parts)
    out = tmp_path / "out"
    errors = [_error(base, inputs.adapter, out, ray) for ray in (None, nodes.address)]
    assert errors[0] == errors[1]
    assert errors[0][0] is ValueRangeError
    time.sleep(2)
    assert_clean(out)


def _error(
    base: Path, adapter: Path, out: Path, ray: str | None
) -> tuple[type[LoraToolError], str, str]:
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, out, ray=ray)
    assert_clean(out)
    return type(caught.value), caught.value.message, caught.value.hint
