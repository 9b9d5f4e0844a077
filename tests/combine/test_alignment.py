"""Adapters of other bases, modules, paths and ranks: refused, or said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.adapters import K, Q, codes, config_of, deltas, lora, pair, write_adapter
from helpers.combining import assert_near, fails, total

import loratool
from loratool.errors import MatchError


def test_different_shapes_are_different_bases(tmp_path: Path, out: Path) -> None:
    """Modules of one name and different shapes are a MatchError with both shapes and adapters."""
    one = lora(tmp_path / "small")
    two = write_adapter(tmp_path / "large", pair(Q, 24, 10), {})
    fails(MatchError, [one, two], out, Q, "12×10", "24×10", "small", "large", "different")


def test_different_base_names_are_a_warning(tmp_path: Path, out: Path) -> None:
    """Base names that differ in more than their path and case are named in a warning."""
    names = ["org/Base-A", "/models/base-a", "org/base-b"]
    sources = [
        lora(tmp_path / str(n), seed=n, base_model_name_or_path=name)
        for n, name in enumerate(names)
    ]
    assert codes(loratool.combine(sources[:2], out)) == []
    report = loratool.combine([sources[0], sources[2]], tmp_path / "other")
    assert codes(report) == ["bases-differ"]
    assert all(name in report.warnings[0].message for name in ("org/Base-A", "org/base-b"))
    assert config_of(tmp_path / "other")["base_model_name_or_path"] == "org/Base-A"


@pytest.mark.parametrize("swapped", [False, True])
def test_paths_that_differ_by_a_prefix_are_refused(
    tmp_path: Path, out: Path, swapped: bool
) -> None:
    """`layers.0.q` and `model.layers.0.q` are one module under two names: nothing is guessed."""
    sources = [lora(tmp_path / "short", "layers.0.q"), lora(tmp_path / "long", "model.layers.0.q")]
    fails(
        MatchError, sources[::-1] if swapped else sources, out, "'layers.0.q'",
        "'model.layers.0.q'", str(sources[0]), str(sources[1]),
    )  # fmt: skip


def test_adapters_of_other_modules_are_joined_with_a_warning(tmp_path: Path, out: Path) -> None:
    """Adapters without a common module are combined, and that is said."""
    sources = [lora(tmp_path / "q", Q, seed=1), lora(tmp_path / "k", K, seed=2)]
    report = loratool.combine(sources, out)
    assert codes(report) == ["nothing-shared"]
    assert [m.ranks for m in report.modules] == [(4, None), (None, 4)]
    assert_near(deltas(out), total(sources, [1, 1]), 1e3)


def test_one_adapter_twice_is_a_warning(two: list[Path], tmp_path: Path, out: Path) -> None:
    """The same adapter under two names counts twice, and a warning names both places."""
    copy = shutil.copytree(two[0], tmp_path / "copy")
    report = loratool.combine([two[0], two[1], copy], out)
    assert codes(report) == ["same-adapter"]
    assert str(copy) in report.warnings[0].message
    assert str(two[0]) in report.warnings[0].message
    assert_near(deltas(out), total(two, [2, 1]), 100)


def test_different_ranks_are_said(tmp_path: Path, out: Path) -> None:
    """Programs that do not know patterns compute something else with them: a warning names it."""
    sources = [lora(tmp_path / "a", Q, "model.k"), lora(tmp_path / "b", Q, seed=3)]
    assert codes(loratool.combine(sources, out)) == []
    kept = loratool.combine(sources, out, keep_patterns=True, overwrite=True)
    assert codes(kept) == ["ranks-differ"]


def test_one_alike_name_is_no_other_class(tmp_path: Path, out: Path) -> None:
    """Paths of which one happens to end like another are not taken for renamed ones."""
    one = lora(tmp_path / "one", "fc", "model.a", "model.b")
    two = lora(tmp_path / "two", "layers.0.fc")
    assert "nothing-shared" in codes(loratool.combine([one, two], out))
