"""Tied matrices keep PEFT's function, and stay tied where they can."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.layer_cases import TIED, merged_model, same_logits
from helpers.models import read, read_json, tiny_llama, train_on_disk
from safetensors.torch import save_file


@pytest.mark.parametrize("name", TIED)
def test_tied_matrices_keep_pefts_function(name: str, tmp_path: Path) -> None:
    """A tied model gives the logits of PEFT's forward pass, and stays tied where it can."""
    config, stays_tied = TIED[name]
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(config))
    assert "lm_head.weight" not in trained.base_state()
    model = merged_model(trained)
    assert same_logits(model, trained.model)
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in read(tmp_path / "merged")) != stays_tied


@pytest.mark.parametrize("name", TIED)
def test_tied_matrices_that_are_both_on_disk(name: str, tmp_path: Path) -> None:
    """A tied base whose file holds the head as a copy gives PEFT's logits all the same."""
    config, stays_tied = TIED[name]
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(config))
    state = trained.base_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, trained.base / "model.safetensors", {"format": "pt"})
    model = merged_model(trained)
    assert same_logits(model, trained.model)
    found = read(tmp_path / "merged")
    alike = torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert alike == stays_tied
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == stays_tied
