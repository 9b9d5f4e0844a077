"""extract --verify reads what was written, and sees what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.extracting import EVERYTHING, Q0, Pair, distance, moved, odd_model, random_for

import loratool
from loratool.adapters.dialects.peft import targets
from loratool.adapters.dialects.peft.targets import extracted_config
from loratool.errors import VerifyError
from loratool.extracting import output as extracted_output
from loratool.storage.values import raw_blocks


@pytest.mark.parametrize("broken", ["saved", "factors"])
def test_verify_sees_what_was_not_written_as_it_was_computed(
    tiny: Pair, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A saved tensor with one wrong bit and factors of another scale fail, and nothing stays."""
    if broken == "saved":

        def blocks(info: Any) -> Any:
            for raw in raw_blocks(info):
                raw[0] ^= 1
                yield raw

        monkeypatch.setattr(extracted_output, "raw_blocks", blocks)
    else:

        def config(*args: Any, **options: Any) -> dict[str, Any]:
            return {**extracted_config(*args, **options), "lora_alpha": 3}

        monkeypatch.setattr(targets, "extracted_config", config)
    tiny.fails(VerifyError, verify=True, **EVERYTHING)


def test_verify_sees_a_wrong_bit_of_an_integer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer of integers is compared byte for byte."""
    state = odd_model()
    tuned = moved(state) | {"model.position_ids": state["model.position_ids"] + 1}

    def blocks(info: Any) -> Any:
        for raw in raw_blocks(info):
            raw[0] ^= info.dtype == "I64"
            yield raw

    monkeypatch.setattr(extracted_output, "raw_blocks", blocks)
    error = Pair(tmp_path, state, tuned).fails(VerifyError, "model.position_ids", verify=True)
    assert "weight" not in error.message


def test_verify_reads_views_of_torch_files(tmp_path: Path) -> None:
    """A tuned matrix that a torch file stores transposed, several blocks long, is read in order."""
    state = {f"{Q0}.weight": (0.1 * random_for("q", 1100, 1000)).float()}
    pair = Pair(tmp_path, state, moved(state, decay=0.5))
    value = pair.after[f"{Q0}.weight"]
    torch.save({f"{Q0}.weight": value.T.contiguous().T}, tmp_path / "view.bin")
    report = loratool.extract(pair.base, tmp_path / "view.bin", pair.out, rank=3, verify=True)
    assert not value.T.is_contiguous()
    assert report.verified == pytest.approx(distance(state, pair.after, pair.out), rel=1e-4)
