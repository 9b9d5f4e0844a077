"""A dry run of extract predicts the sizes and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import WEIGHTS
from helpers.extracting import Pair, model, moved
from helpers.outcomes import assert_clean

from loratool.errors import UsageError


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"skip": ["norms"]}, {"save": ["lm_head"]},
                                     {"embeddings": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_a_dry_run_predicts_the_sizes(tmp_path: Path, dtype: str, options: Any, tied: bool) -> None:
    """A dry run writes nothing, measures what a run does, and its sizes are those of the files."""
    state = model()
    if tied:
        del state["lm_head.weight"]
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=tied)
    planned = pair.extract(dry_run=True, dtype=dtype, **options)
    assert_clean(pair.out)
    assert list(planned.proposals) == [4, 8, 16]  # no module has more
    for rank in (4, 16):
        report = pair.extract(rank=rank, dtype=dtype, **options)
        assert planned.proposals[rank] == report.bytes_written
        assert (pair.out / WEIGHTS).stat().st_size == report.bytes_written
    assert planned.norm == report.norm
    assert planned.noise == report.noise
    assert planned.unchanged == report.unchanged
    assert (planned.saved, planned.left) == (report.saved, report.left)
    for before, after in zip(planned.modules, report.modules, strict=True):
        assert (before.path, before.norm, before.noise) == (after.path, after.norm, after.noise)
        assert before.relative == after.relative
        assert (before.rank, before.kept, before.error) == (None, None, None)
    assert (planned.held, planned.error, planned.dry_run) == (None, None, True)
    assert pair.extract(rank=5, dry_run=True, dtype=dtype, **options).proposals.keys() == {5}


@pytest.mark.parametrize("extra", [-1, 0, 1, 50])
def test_a_dry_run_with_a_budget_is_right_about_the_rank(tiny: Pair, extra: int) -> None:
    """The one rank that a dry run sees in a budget is what --uniform writes; and a budget of just
    the size of a file is enough for it."""
    size = tiny.extract(rank=8).bytes_written
    planned = tiny.extract(budget=size + extra, dry_run=True)
    report = tiny.extract(budget=size + extra, uniform=True)
    assert planned.proposals == {report.rank: report.bytes_written}
    assert report.rank == (7 if extra < 0 else 8)


def test_a_dry_run_that_no_rank_fits_says_so(tiny: Pair) -> None:
    """A budget that is too small for one rank is refused before anything is decomposed, too."""
    tiny.fails(UsageError, "too small", rank=None, budget=100, dry_run=True)
