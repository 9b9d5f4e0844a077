"""Tied matrices keep PEFT's function, and stay tied where they can."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import PREFIX, Q, codes, pair, write_adapter
from helpers.files import random_of, write_base
from helpers.layer_cases import TIED, merged_model, same_logits
from helpers.models import read, read_json, tiny_llama, train_on_disk
from safetensors.torch import save_file

import loratool
import loratool.errors


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


def test_xlnet_ties_under_a_name_of_its_own(tmp_path: Path) -> None:
    """A trained token embedding of XLNet leaves its head, which is called lm_loss, what it was."""
    name = "transformer.word_embedding.weight"
    state = {name: random_of(torch.float32, 40, 8), "lm_loss.bias": torch.zeros(40)}
    state[f"{Q}.weight"] = random_of(torch.float32, 12, 10)
    base = write_base(tmp_path / "base", state, config={
        "model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "tie_word_embeddings": True,
    })  # fmt: skip
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"{PREFIX}{name}": np.ones((40, 8), np.float32), **pair(Q, 12, 10)},
        {"modules_to_save": ["word_embedding"]},
    )
    loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    out = read(tmp_path / "out")
    assert set(out) == {*state, "lm_loss.weight"}
    assert torch.equal(out["lm_loss.weight"], state[name])
    assert torch.equal(out[name], torch.ones(40, 8))


def test_vocabularies_of_other_parts_may_have_other_sizes(tmp_path: Path) -> None:
    """A resized vocabulary is held against those of its own size, not a text encoder's."""
    state = {
        "language_model.model.embed_tokens.weight": random_of(torch.float32, 200, 8),
        "language_model.lm_head.weight": random_of(torch.float32, 200, 8),
        "text_encoder.shared.weight": random_of(torch.float32, 50, 8),
        "vae.decoder.weight": random_of(torch.float32, 200, 3),
        "vae.decoder.bias": random_of(torch.float32, 200),
        f"{Q}.weight": random_of(torch.float32, 12, 10),
    }
    base = write_base(tmp_path / "base", state)
    both = [name for name in state if name.startswith("language_model")]
    tensors = {f"{PREFIX}{name}": np.ones((208, 8), np.float32) for name in both}
    tensors |= pair(Q, 12, 10)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "adapter", tensors, saved)
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    found = read(tmp_path / "out")
    assert {name: len(found[name]) for name in state} == {
        **dict.fromkeys(both, 208),
        "text_encoder.shared.weight": 50,
        "vae.decoder.weight": 200,
        "vae.decoder.bias": 200,
        f"{Q}.weight": 12,
    }
    assert "head-bias-resized" not in codes(report)
    del tensors[f"{PREFIX}{both[1]}"]
    alone = write_adapter(tmp_path / "alone", tensors, saved)
    with pytest.raises(loratool.errors.MatchError, match="vocabularies differ"):
        loratool.merge(base, alone, tmp_path / "none")


def test_a_head_with_padding_is_of_the_same_vocabulary(tmp_path: Path) -> None:
    """A head of a few rows more than the embedding is held against an embedding that is resized."""
    state = {
        "model.embed_tokens.weight": random_of(torch.float32, 200, 8),
        "lm_head.weight": random_of(torch.float32, 210, 8),
        f"{Q}.weight": random_of(torch.float32, 12, 10),
    }
    base = write_base(tmp_path / "base", state)
    rows = {f"{PREFIX}model.embed_tokens.weight": np.ones((208, 8), np.float32)}
    saved = {"modules_to_save": ["embed_tokens"]}
    adapter = write_adapter(tmp_path / "adapter", {**rows, **pair(Q, 12, 10)}, saved)
    with pytest.raises(loratool.errors.MatchError, match="vocabularies differ"):
        loratool.merge(base, adapter, tmp_path / "out")
