"""Heads that the base lacks are added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layer_cases import merged_model, same_logits, train_head
from helpers.models import Trained, lora, read, read_json, tiny_llama, write_adapter
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification


@pytest.mark.parametrize("saved", [None, ["score"]], ids=["automatic", "named"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_classification_head_that_the_base_lacks_is_added(
    saved: list[str] | None, tied: bool, tmp_path: Path
) -> None:
    """A classifier trained on a language model gives a loadable classifier with its labels."""
    trained = train_head(
        tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", tied, modules_to_save=saved
    )
    model = merged_model(trained, AutoModelForSequenceClassification)
    assert same_logits(model, trained.model)
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert model.config.num_labels == 5
    assert len(config["id2label"]) == 5


def test_token_classification_head_that_the_base_lacks_is_added(tmp_path: Path) -> None:
    """A tagger trained on a language model loads as a tagger, with the bias of its head."""
    trained = train_head(tmp_path, AutoModelForTokenClassification, "TOKEN_CLS", False)
    model = merged_model(trained, AutoModelForTokenClassification)
    assert same_logits(model, trained.model)
    assert model.config.num_labels == 5


def test_biases_and_a_new_head_are_saved_by_one_adapter(tmp_path: Path) -> None:
    """bias="all" with a trained head, of which PEFT also writes an untrained copy, merges."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(attention_bias=True).save_pretrained(base)
    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    config = lora("q_proj", task_type="TOKEN_CLS", bias="all")
    trained = Trained(base, adapter, write_adapter(adapter, model.float(), config))
    assert any("original_module" in key for key in read(adapter))
    assert same_logits(merged_model(trained, AutoModelForTokenClassification), trained.model)
