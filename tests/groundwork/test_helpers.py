"""What the helpers of the tests promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import ADAPTED, LLAMA, load, lora_on, small_lora, small_state, write_base
from helpers.tool_roundings import ADAPTER, factors
from peft import LoraConfig

import loratool


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


def test_adapter_helpers_agree(tmp_path: Path) -> None:
    """The small adapter of these tests adds exactly B·A."""
    b, a = np.array([[2.0]] + [[0.0]] * 7), np.arange(8.0)[None]
    lora = lora_on(tmp_path / "lora", b, a)
    base = write_base(tmp_path / "base", {**small_state(), ADAPTED: torch.zeros(8, 8)})
    loratool.merge(base, lora, tmp_path / "out", dtype="float32")
    wanted = torch.zeros(8, 8)
    wanted[0] = 2 * torch.arange(8.0)
    assert torch.equal(load(tmp_path / "out")[ADAPTED], wanted)


def test_the_config_of_these_tests_is_a_llama() -> None:
    """These bases are of an architecture whose weights are not stored transposed."""
    assert LLAMA["model_type"] == "llama"


def test_config_of_peft_is_what_the_helpers_assume() -> None:
    """The fixture's adapter has the scale of 2 that the arithmetic above writes out."""
    config = LoraConfig.from_pretrained(ADAPTER)
    assert isinstance(config, LoraConfig)
    assert config.lora_alpha / config.r == 2
    assert not config.use_rslora
    assert len(factors()) == 28
