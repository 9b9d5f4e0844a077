"""Weights that are stored transposed are told from linear ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layer_cases import Case, conv1d
from helpers.models import Holder, close, differing, write_json
from transformers.pytorch_utils import Conv1D

from loratool.errors import BaseError


def test_square_conv1d_is_not_taken_for_linear(tmp_path: Path) -> None:
    """The same square weights merge differently as GPT-2's Conv1D and as a linear layer."""
    trained = conv1d(16, 16).train(tmp_path)
    as_conv1d = trained.merge()["c_fc.weight"]
    write_json(trained.base / "config.json", {"model_type": "llama"})
    as_linear = trained.merge(tmp_path / "linear")["c_fc.weight"]
    weight = trained.base_state()["c_fc.weight"]
    assert close(as_conv1d - weight, (as_linear - weight).T, 1e-5)
    assert not torch.equal(as_conv1d, as_linear)


def test_conv1d_of_a_base_without_config_follows_fan_in_fan_out(tmp_path: Path) -> None:
    """Without config.json a rectangular Conv1D merges right, a square one is refused."""
    for inner, outer in ((24, 40), (32, 32)):
        case = Case(lambda i=inner, o=outer: Holder(c_fc=Conv1D(o, i)), ("c_fc",))
        trained = case.train(tmp_path / str(outer))
        if inner == outer:
            with pytest.raises(BaseError, match="square"):
                trained.merge()
        else:
            assert differing(trained.merge(), trained.peft_merge()) == {}
