"""Where unmerge may write, what a dry run says, and when the undo file is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.files import load
from helpers.outcomes import assert_clear, sha256s
from helpers.unmerging import UNDO

import loratool
from loratool.errors import OutputError, RestoreError
from loratool.storage.header import read_header


def test_outputs_that_would_harm_are_refused(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """An output that exists, or is, holds or lies in an input, is left alone."""
    base, adapters, out = two
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    before = sha256s(tmp_path)
    for place in (out, out / "below", adapters[0], adapters[1] / "below", tmp_path, taken):
        for options in ({}, {"subtract": True}, {"dry_run": True}):
            with pytest.raises(OutputError) as caught:
                loratool.unmerge(out, adapters, place, **options)
            assert_clear(caught.value)
    with pytest.raises(OutputError):
        loratool.unmerge(out, adapters, base, base=base, overwrite=True)
    assert sha256s(tmp_path) == before


def test_an_output_is_replaced_only_by_a_complete_one(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """With overwrite the old output stays until the new one is there, also if that fails."""
    base, adapters, out = two
    back = tmp_path / "back"
    shutil.copytree(out, back)
    path = out / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    before = sha256s(back)
    with pytest.raises(RestoreError):
        loratool.unmerge(out, adapters, back, overwrite=True)
    assert sha256s(back) == before
    path.write_bytes(content)
    loratool.unmerge(out, adapters, back, overwrite=True)
    assert sha256s(back) == sha256s(base)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_dry_run_of_unmerge_writes_nothing(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """It says what the run itself says, but for the time it took."""
    base, adapters, out = two
    before = sha256s(tmp_path)
    plans = {}
    for subtract in (False, True):
        plans[subtract] = loratool.unmerge(
            out, adapters, tmp_path / "back", subtract=subtract, dry_run=True
        )
    assert sha256s(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "style", "task"]
    for subtract, plan in plans.items():
        report = loratool.unmerge(out, adapters, tmp_path / f"back-{subtract}", subtract=subtract)
        volatile = {"output", "seconds", "bytes_free", "dry_run"}
        one, other = ({k: v for k, v in r.to_dict().items() if k not in volatile}
                      for r in (plan, report))  # fmt: skip
        assert one == other
    assert plans[False].exact
    assert plans[False].bytes_written == sum(t.nbytes for t in load(base).values())
    assert plans[False].undo_bytes == (out / UNDO).stat().st_size
    assert not plans[True].exact


def test_a_merge_says_how_large_the_undo_file_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The size is reported; a dry run foretells how much of it the weights will take."""
    for dtype in ("float16", "bfloat16", "base"):
        out = tmp_path / dtype
        plan = loratool.merge(base, adapter, out, dtype=dtype, reversible=True, dry_run=True)
        assert not out.exists()
        report = loratool.merge(base, adapter, out, dtype=dtype, reversible=True)
        assert report.undo_bytes == (out / UNDO).stat().st_size
        entries, _ = read_header(out / UNDO)
        weights = sum(i.nbytes for n, i in entries.items() if n.startswith("residual:"))
        assert weights / 1.3 < plan.undo_bytes < report.undo_bytes * 1.3


def test_the_undo_file_is_written_only_where_it_is_asked_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """A plain merge and a reversible one write the same model; the undo file, and its mention in
    the record, is all there is more."""
    loratool.merge(base, adapter, tmp_path / "plain")
    loratool.merge(base, adapter, tmp_path / "both", reversible=True)
    plain, both = sha256s(tmp_path / "plain"), sha256s(tmp_path / "both")
    assert both.keys() - plain.keys() == {str(UNDO)}
    assert {n for n in plain if plain[n] != both[n]} == {"loratool.json"}
