"""Stacks of experts in compare: expert by expert, however each adapter has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import write_adapter
from helpers.experts import DOWN, GATE_UP, expert_pairs, packed, stacks

import loratool
from loratool.errors import MatchError

UP, DN = expert_pairs(5, 12, 8, 4), expert_pairs(5, 8, 6, 4, seed=1)


def test_each_expert_is_compared(tmp_path: Path) -> None:
    """An expert that differs is named, the others are the same."""
    other = [(b * (2 if n == 3 else 1), a) for n, (b, a) in enumerate(UP)]
    one, two = stacks(tmp_path / "a", UP, DN), stacks(tmp_path / "b", other, DN)
    report = loratool.compare([one, two])
    assert [m.path for m in report.modules][5:] == [f"{DOWN}.{n}" for n in range(5)]
    assert [line.split()[1] for line in report.differing] == [f"{GATE_UP}.3:"]


def test_stacks_that_lie_transposed_are_turned(tmp_path: Path) -> None:
    """The same deltas of PEFT 0.18, which has them transposed, are the same."""
    turned = [[(a.T, b.T) for b, a in pairs] for pairs in (UP, DN)]
    one = stacks(tmp_path / "new", UP, DN)
    two = stacks(tmp_path / "old", turned[0], turned[1], peft_version="0.18.1")
    assert loratool.compare([one, two]).equal


def test_square_stacks_of_two_versions_are_refused(tmp_path: Path) -> None:
    """How square stacks of two versions lie to each other is not guessed."""
    tensors = packed("x.experts", expert_pairs(5, 8, 8, 4))

    def saved(version: str) -> Path:
        config = {"target_parameters": ["experts.down_proj"], "peft_version": version}
        return write_adapter(tmp_path / version, tensors, config)

    assert loratool.compare([saved("0.20.0"), saved("0.21.2")]).equal
    with pytest.raises(MatchError, match="square"):
        loratool.compare([saved("0.21.2"), saved("0.18.1")])


def test_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    """Stacks with different numbers of experts are of different models."""
    one, two = stacks(tmp_path / "a", UP, DN), stacks(tmp_path / "b", UP[:4], DN[:4])
    with pytest.raises(MatchError, match="5 experts"):
        loratool.compare([two, one])
