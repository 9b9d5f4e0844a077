"""The code in a card runs, and loads the model that the card describes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import pair, write_adapter
from helpers.cardless import write_card
from helpers.cards import BASE, ID, KINDS, blocks, data, logits, run_code
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loratool
from loratool.errors import LoraToolError
from loratool.publishing.cards.document import BEGIN, make_card


def places(made: dict[str, Path], kind: str) -> dict[str, Path]:
    return {ID: BASE, f"path/to/{kind}": made[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_runs(made: dict[str, Path], kind: str) -> None:
    """There is one block of Python, and it loads a model that computes."""
    found = run_code(make_card(made[kind], None), places(made, kind))
    assert logits(found).shape[-1] == 256
    with_id = make_card(made[kind], None, repo_id="me/mine")
    logits(run_code(with_id, {ID: BASE, "me/mine": made[kind]}))


def test_merged_and_adapter_agree(made: dict[str, Path]) -> None:
    """What the merged model's card loads computes what the adapter's card loads."""
    one = logits(run_code(make_card(made["plain"], None), places(made, "plain")))
    other = logits(run_code(make_card(made["merged"], None), places(made, "merged")))
    base = logits(run_code(make_card(made["base"], None), places(made, "base")))
    moved = (one - base).norm()
    assert moved > 1
    assert (one - other).norm() < 0.01 * moved


def test_the_merge_line_runs(made: dict[str, Path], tmp_path: Path) -> None:
    """The command in an adapter's card gives the model that the Python gives."""
    text = make_card(made["extracted"], None)
    line = blocks(text, "sh")[-1].split()
    assert line == ["loratool", "merge", ID, "path/to/extracted", "-o", "merged"]
    loratool.merge(BASE, made["extracted"], tmp_path / "merged", dtype="float32")
    one = logits(run_code(text, places(made, "extracted")))
    merged = make_card(tmp_path / "merged", None)
    other = logits(run_code(merged, {"path/to/merged": tmp_path / "merged"}))
    assert (one - other).norm() < 0.01 * one.norm()


def test_a_longer_vocabulary(tmp_path: Path) -> None:
    """An adapter with an embedding of its own makes the code resize the base."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.resize_token_embeddings(260)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = ID
    tuned.save_pretrained(tmp_path / "longer")
    write_card(tuned, str(tmp_path / "longer"))
    template = (tmp_path / "longer" / "README.md").read_text(encoding="utf-8")
    text = make_card(tmp_path / "longer", template)
    assert "model.resize_token_embeddings(260)" in text
    # PEFT's template has a block of Python too, or none: ours is between the markers.
    own = text.split(BEGIN)[1]
    found = run_code(own, {ID: BASE, "path/to/longer": tmp_path / "longer"})
    assert logits(found).shape[-1] == 260
    assert "[More Information Needed]" in text
    assert text.startswith("---\n")
    assert template.partition("\n---\n")[2] in text
    assert data(text)["tags"][: len(data(template)["tags"])] == data(template)["tags"]


def test_classes_by_task(tmp_path: Path) -> None:
    """The class is the task's, a head's size is taken over, and what is not certain is not said."""

    def card(name: str, extra: dict[str, Any], **config: Any) -> str:
        tensors = pair("model.layers.0.self_attn.q_proj", 12, 10)
        config = {"base_model_name_or_path": "org/base", **config}
        return make_card(write_adapter(tmp_path / name, tensors | extra, config), None)

    import numpy as np

    score = {"base_model.model.score.weight": np.zeros((5, 12), np.float32)}
    text = card("labels", score, task_type="SEQ_CLS", modules_to_save=["score"])
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)" in text
    assert data(text)["pipeline_tag"] == "text-classification"
    text = card("t5", {}, task_type="SEQ_2_SEQ_LM")
    assert "AutoModelForSeq2SeqLM" in text
    assert "pipeline_tag" not in data(text)
    text = card("none", {})
    assert "AutoModelForCausalLM" in text
    assert "# No task is recorded" in text
    assert "pipeline_tag" not in data(text)
    mapping = {"base_model_class": "BertForTokenClassification",
               "parent_library": "transformers.models.bert.modeling_bert"}  # fmt: skip
    assert "AutoModelForTokenClassification" in card("bert", {}, auto_mapping=mapping)
    other = {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models"}
    text = card("unet", {}, auto_mapping=other)
    assert "```python" not in text
    assert "`UNet2DConditionModel`" in text
    assert data(text)["library_name"] == "peft"


def test_models_without_a_config(made: dict[str, Path], tmp_path: Path) -> None:
    """No library and no code where nothing says how to build the model."""
    folder = shutil.copytree(made["merged"], tmp_path / "bare")
    (folder / "config.json").unlink()
    text = make_card(folder, None)
    assert "library_name" not in data(text)
    assert "```python" not in text
    assert "no `config.json`" in text
    (folder / "config.json").write_text(
        '{"architectures": ["OddForCausalLM"], "auto_map": {"a": "b"}}'
    )
    (folder / "tokenizer.json").unlink()
    text = make_card(folder, None)
    assert data(text)["library_name"] == "transformers"
    assert "AutoTokenizer" not in text
    assert "read that code first" in text


def test_other_adapters(tmp_path: Path) -> None:
    """What PEFT cannot load, and what is no LoRA, is called what it is."""
    bare = write_adapter(tmp_path / "bare", pair("model.layers.0.q", 12, 10), None)
    text = make_card(bare, None)
    assert "PEFT cannot load this" in text
    assert "library_name" not in data(text)
    assert "| unknown | unknown |" in text
    assert "loratool merge" not in text
    poly = write_adapter(tmp_path / "poly", pair("a.q", 12, 10), {"peft_type": "POLY"})
    text = make_card(poly, None)
    assert "lora" not in data(text)["tags"]
    assert "Poly" in text
    with pytest.raises(LoraToolError):
        make_card(tmp_path, None)
