"""Threads, seeds, files and shards: the same bytes where they shall be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS
from helpers.extracting import Q0, Pair, model, moved, random_for, write
from helpers.outcomes import assert_clean, assert_clear, sha256s
from safetensors.torch import load_file

import loratool
from loratool.errors import UsageError


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.7}, {"budget": "30KB"}], ids=str)
def test_bytes_depend_neither_on_threads_nor_on_the_run(tmp_path: Path, options: Any) -> None:
    """Two runs, and 1 and 3 threads, write the same three files."""
    state = model(size=96, layers=1)
    pair = Pair(tmp_path, state, moved(state, decay=0.9))
    found = []
    for threads in (None, 1, 3):
        pair.extract(threads=threads, dtype="bfloat16", **options)
        found.append(sha256s(pair.out))
    assert set(found[0]) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert found[0] == found[1] == found[2]


def test_the_seed_matters_only_where_something_is_random(tmp_path: Path, tiny: Pair) -> None:
    """Small matrices, and all with --exact, do not depend on the seed; large ones do, a little."""
    for pair, exact, same in (
        (tiny, False, True),
        (Pair(tmp_path / "large", *_large()), False, False),
        (Pair(tmp_path / "exact", *_large()), True, True),
    ):
        digests, errors = set(), []
        for seed in (0, 7):
            report = pair.extract(rank=2, seed=seed, exact=exact)
            digests.add(sha256s(pair.out)[WEIGHTS])
            errors.append(report.error)
        assert (len(digests) == 1) is same
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def _large() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = {f"{Q0}.weight": random_for("q", 120, 130).float()}
    return state, moved(state, decay=0.9)


def test_any_seed_will_do(tmp_path: Path) -> None:
    """A seed of many digits is no crash: it is taken or refused in words."""
    pair = Pair(tmp_path, *_large())
    try:
        pair.extract(rank=2, seed=10**20)
    except UsageError as error:
        assert_clear(error, "seed")
        assert_clean(pair.out)


def test_files_and_shards_do_not_matter(tmp_path: Path, tiny: Pair) -> None:
    """The same tensors in shards or in a torch file give the same weights."""
    tiny.extract(rank=3)
    wanted = sha256s(tiny.out)[WEIGHTS]
    for kind in ("shards", "bin"):
        folder = tmp_path / kind
        base = write(folder / "base", tiny.before, kind)
        fine = write(folder / "fine", tiny.after, kind)
        loratool.extract(base, fine, folder / "out", rank=3, dtype="float32")
        mine = load_file(folder / "out" / WEIGHTS)
        theirs = load_file(tiny.out / WEIGHTS)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert wanted == sha256s(tiny.out)[WEIGHTS]


def test_progress_ends_at_the_total(tiny: Pair) -> None:
    """Progress grows to exactly the bytes announced, with and without --verify and a dry run."""
    for options in ({"rank": 2}, {"rank": 2, "verify": True}, {"dry_run": True}):
        calls: list[tuple[int, int, str]] = []
        tiny.extract(progress=lambda *call: calls.append(call), **options)  # noqa: B023
        done = [c[0] for c in calls]
        assert done == sorted(done)
        assert calls[-1][0] == calls[-1][1], options
