"""Where extract may write, and what comes along."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from helpers.adapters import config_of
from helpers.extracting import Pair
from helpers.files import NORM
from helpers.outcomes import assert_clear, beside, sha256s
from safetensors.torch import save_file

import loratool
from loratool.errors import OutputError, ValueRangeError


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("where", ["same", "inside", "around", "linked"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_in_the_place_of_an_input_is_refused(
    tmp_path: Path, tiny: Pair, which: str, where: str, overwrite: bool
) -> None:
    """Equal to, inside of or around an input, by any path: refused, and the inputs stay."""
    source = tiny.base if which == "base" else tiny.tuned
    (tmp_path / "link").symlink_to(source)
    output = {
        "same": source, "inside": source / "lora", "around": source.parent,
        "linked": tmp_path / "link" / "lora",
    }[where]  # fmt: skip
    before = sha256s(tmp_path / "in")
    with pytest.raises(OutputError) as caught:
        loratool.extract(tiny.base, tiny.tuned, output, rank=2, overwrite=overwrite)
    assert_clear(caught.value, str(tmp_path / "in"))
    assert sha256s(tmp_path / "in") == before
    assert sorted(os.listdir(tmp_path / "in")) == ["base", "fine"]


def test_an_existing_output_stays_unless_it_may_be_overwritten(tmp_path: Path, tiny: Pair) -> None:
    """Without --overwrite nothing is replaced, a dry run refuses too; with it only an adapter."""
    tiny.extract(rank=2)
    before = sha256s(tiny.out)
    for dry_run in (False, True):
        with pytest.raises(OutputError) as caught:
            loratool.extract(tiny.base, tiny.tuned, tiny.out, rank=3, dry_run=dry_run)
        assert_clear(caught.value, str(tiny.out))
        assert "--overwrite" in caught.value.hint
        assert sha256s(tiny.out) == before
    with pytest.raises(ValueRangeError):  # a failed overwrite keeps what was there
        loratool.extract(
            tiny.base, tiny.tuned, tiny.out, rank=3, overwrite=True, include=["k_proj"],
            skip=["biases"], exclude=["k_proj"],
        )  # fmt: skip
    assert sha256s(tiny.out) == before
    loratool.extract(tiny.base, tiny.tuned, tiny.out, rank=3, overwrite=True)
    assert config_of(tiny.out)["r"] == 3
    assert beside(tiny.out) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError):
        loratool.extract(tiny.base, tiny.tuned, mine, rank=3, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "mine"


def test_missing_parents_are_made_and_taken_away_again(tmp_path: Path, tiny: Pair) -> None:
    """An output in directories that do not exist is made with them; a refused one makes none."""
    loratool.extract(tiny.base, tiny.tuned, tmp_path / "new" / "deep" / "out", rank=2)
    assert os.listdir(tmp_path / "new" / "deep") == ["out"]
    after = dict(tiny.after)
    after[NORM] = torch.full((16,), math.nan)
    save_file(after, tiny.tuned / "model.safetensors")
    with pytest.raises(ValueRangeError):
        loratool.extract(tiny.base, tiny.tuned, tmp_path / "other" / "out", rank=2)
    assert not (tmp_path / "other").exists()


def test_a_new_tokenizer_comes_along(tmp_path: Path, tiny: Pair) -> None:
    """The tuned model's tokenizer is in the adapter if it is another one, and not otherwise."""
    for folder in (tiny.base, tiny.tuned):
        (folder / "tokenizer.json").write_text("{}")
    tiny.extract(rank=1)
    assert not (tiny.out / "tokenizer.json").exists()
    (tiny.tuned / "tokenizer.json").write_text('{"new": 1}')
    tiny.extract(rank=1)
    assert (tiny.out / "tokenizer.json").read_text() == '{"new": 1}'
