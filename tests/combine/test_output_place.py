"""Where combine may write: nothing of value is replaced, and no input is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import WEIGHTS
from helpers.outcomes import assert_clear, beside, sha256s

import loratool
from loratool.errors import OutputError, ValueRangeError


def test_an_existing_output_stays(two: list[Path], out: Path) -> None:
    """An output that exists is refused and stays; --overwrite-all replaces it with all in it."""
    loratool.combine(two, out)
    (out / "README.md").write_text("old")
    before = sha256s(out)
    with pytest.raises(OutputError) as caught:
        loratool.combine(two, out, weights=[1, 2])
    assert "--overwrite" in caught.value.hint
    assert sha256s(out) == before
    loratool.combine(two, out, weights=[1, 2], overwrite="all")
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert sha256s(out)[WEIGHTS] != before[WEIGHTS]
    assert beside(out) == []


@pytest.mark.parametrize("place", ["in/one", "in/one/out", "in", f"in/two/{WEIGHTS}"])
@pytest.mark.parametrize("as_file", [False, True], ids=["directories", "files"])
def test_inputs_are_never_written_to(
    tmp_path: Path, two: list[Path], place: str, as_file: bool
) -> None:
    """An output that is, contains or is in an input is refused even with --overwrite."""
    if as_file and place == "in/one/out":
        return  # beside an input that is a file
    before = sha256s(tmp_path)
    sources = [folder / WEIGHTS for folder in two] if as_file else two
    with pytest.raises(OutputError) as caught:
        loratool.combine(sources, tmp_path / place, overwrite=True)
    assert_clear(caught.value, str(tmp_path / place))
    assert sha256s(tmp_path) == before


def test_what_is_no_adapter_is_not_overwritten(two: list[Path], out: Path) -> None:
    """--overwrite does not delete a directory of other things."""
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError):
        loratool.combine(two, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"


def test_a_failed_overwrite_keeps_the_old_output(two: list[Path], out: Path) -> None:
    """The old adapter goes when the new one is whole, not before."""
    loratool.combine(two, out)
    before = sha256s(out)
    with pytest.raises(ValueRangeError):
        loratool.combine(two, out, weights=[1e12, 1], dtype="float16", overwrite=True)
    assert sha256s(out) == before
    assert beside(out) == []
