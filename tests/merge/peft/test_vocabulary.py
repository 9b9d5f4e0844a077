"""Trained token rows and resized vocabularies, as PEFT has them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.layer_cases import (
    RESIZED,
    TOKEN_ROWS,
    Case,
    merged_model,
    refuse,
    same_logits,
    train_resized,
)
from helpers.models import Holder, differing, lora, read, read_json, tiny_llama, train_on_disk
from peft import TrainableTokensConfig
from torch import nn

from loratool.errors import LoraToolError


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TOKEN_ROWS)
def test_trained_token_rows_replace_those_of_the_embedding(
    name: str, tied: bool, tmp_path: Path
) -> None:
    """trainable_token_indices replaces rows in the config's order, in a tied head as PEFT does."""
    setting = TOKEN_ROWS[name]
    llama = tiny_llama(tie_word_embeddings=tied)
    trained = train_on_disk(tmp_path, llama, lora("q_proj", trainable_token_indices=setting))
    assert same_logits(merged_model(trained), trained.model)
    found, base = read(tmp_path / "merged"), trained.base_state()
    rows = (found["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]).any(dim=1)
    wanted = setting if isinstance(setting, list) else next(iter(setting.values()))
    assert rows.nonzero().flatten().tolist() == sorted(wanted)


def test_trained_token_rows_of_the_head_alone(tmp_path: Path) -> None:
    """Rows of an output head of its own are replaced there and nowhere else."""
    rows = {"embed_tokens": [9, 4], "lm_head": [5]}
    trained = train_on_disk(tmp_path, tiny_llama(), lora("q_proj", trainable_token_indices=rows))
    assert same_logits(merged_model(trained), trained.model)


def test_trained_token_rows_reach_a_tied_head_that_is_adapted(tmp_path: Path) -> None:
    """PEFT ties trained rows to a tied head, also where LoRA adapts that head."""
    config = lora("q_proj", "lm_head", trainable_token_indices=[5, 7])
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), config)
    assert same_logits(merged_model(trained), trained.model)


def test_trained_token_rows_in_a_half_precision_base(tmp_path: Path) -> None:
    """Token rows in a bfloat16 embedding are PEFT's, bit for bit."""
    case = Case(
        lambda: Holder(embed_tokens=nn.Embedding(30, 8), l=nn.Linear(8, 8)),
        options={"trainable_token_indices": {"embed_tokens": [4, 2, 29]}},
    )
    trained = case.train(tmp_path, torch.bfloat16)
    assert differing(trained.merge(), trained.peft_merge()) == {}


def test_adapter_of_trained_tokens_alone(tmp_path: Path) -> None:
    """An adapter of PEFT's trainable-tokens type, without any low-rank part, merges too."""
    config = TrainableTokensConfig(token_indices=[5, 3], target_modules=["embed_tokens"])
    trained = train_on_disk(tmp_path, tiny_llama(), config)
    assert same_logits(merged_model(trained), trained.model)
    assert differing(read(tmp_path / "merged"), trained.base_state())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [47, 64])
@pytest.mark.parametrize("name", RESIZED)
def test_resized_vocabulary_is_carried_over(
    name: str, size: int, tied: bool, tmp_path: Path
) -> None:
    """An embedding that grew or lost its padding replaces the base's, and config.json follows."""
    trained = train_resized(tmp_path, size, tied, copy.deepcopy(RESIZED[name]))
    model = merged_model(trained)
    assert same_logits(model, trained.model, min(size, 48))
    assert read_json(tmp_path / "merged" / "config.json")["vocab_size"] == size
    assert model.get_input_embeddings().weight.shape[0] == size
    assert model.get_output_embeddings().weight.shape[0] == size


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_resized_and_adapted_matrix_of_two_tied_ones(target: str, tmp_path: Path) -> None:
    """The other of two tied matrices is resized along, but has no part in the delta."""
    trained = train_resized(tmp_path, 53, True, lora("q_proj", target))
    assert same_logits(merged_model(trained), trained.model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_resized_vocabulary_that_was_saved_by_half_is_refused(target: str, tmp_path: Path) -> None:
    """If embedding and head would end with unlike vocabularies, nothing loads; so no merge."""
    # PEFT saves only the one that LoRA adapts, and loses the other.
    trained = train_resized(tmp_path, 53, False, lora("q_proj", target))
    refuse(trained, LoraToolError, "rows|vocab")
