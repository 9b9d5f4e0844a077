"""Bases without prefix or head, classifiers, other vocabularies and tied heads, in PEFT."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, GPT2, GROUPED, LABELS, Architecture, Inputs, causal
from helpers.models import read, read_json
from helpers.tuning import MODELS, WARNINGS, Tuning, perturb, tune
from transformers import AutoModelForSequenceClassification

from loratool.errors import MatchError


def bare(folder: Path, prefix: str) -> None:
    """Take a prefix off all names of a file, as in the Hub's gpt2; the class stays that named."""
    from safetensors.torch import save_file

    state = {name.removeprefix(prefix): value for name, value in read(folder).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("sides", [["base"], ["tuned"], ["base", "tuned"]])
@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")]
)
def test_files_without_the_prefix_of_the_class(
    name: str, prefix: str, sides: list[str], tmp_path: Path
) -> None:
    """Files of old, like the Hub's gpt2, lack the name under which the class holds the model."""
    work = tune(tmp_path, MODELS[name])
    for side in sides:
        bare(tmp_path / side, prefix)
        assert read_json(tmp_path / side / "config.json")["architectures"] == [MODELS[name].model]
    work.extract()
    work.check(None, *WARNINGS.get(name, ()))


def test_base_saved_without_its_head(tmp_path: Path) -> None:
    """A base of the bare class, GPT2Model, and a tuned GPT2LMHeadModel meet."""
    found = MODELS["gpt2"]
    work = tune(tmp_path, found)
    model: Any = found.load(work.base)
    model.transformer.save_pretrained(work.base)
    work.extract()
    work.check(None, *WARNINGS["gpt2"])


def sequences(name: str, settings: dict[str, Any]) -> Architecture:
    model = f"{name}ForSequenceClassification"
    return Architecture(model, f"{name}Config", {**settings, **LABELS})


#: The class of the base, and the tuned model.
HEADS = {
    "llama": ("LlamaForCausalLM", ARCHITECTURES["llama-classifier"]),
    "qwen2-tied": (
        "Qwen2ForCausalLM", sequences("Qwen2", {**GROUPED, "tie_word_embeddings": True})
    ),
    "gpt2": ("GPT2LMHeadModel", sequences("GPT2", GPT2)),
    "opt": ("OPTForCausalLM", sequences("OPT", ARCHITECTURES["opt"].settings)),
    "bert": ("BertForMaskedLM", ARCHITECTURES["bert"]),
    "bert-bare": ("BertModel", ARCHITECTURES["bert"]),
    "roberta": ("RobertaForMaskedLM", ARCHITECTURES["roberta"]),
    "distilbert": ("DistilBertForMaskedLM", ARCHITECTURES["distilbert"]),
    "electra": ("ElectraForPreTraining", ARCHITECTURES["electra"]),
    "deberta": ("DebertaV2ForMaskedLM", ARCHITECTURES["deberta-v2"]),
    "vit": ("ViTModel", ARCHITECTURES["vit"]),
}  # fmt: skip


def classifier_of(work: Tuning, base_class: str) -> None:
    """A base without a classifier, and a fine-tune of it with one."""
    before = replace(work.found, model=base_class).make()
    perturb(before, 0.1, 5)
    before.save_pretrained(work.base)
    cls = getattr(transformers, work.found.model)
    torch.manual_seed(2)
    model = cls.from_pretrained(work.base, dtype=torch.float32, num_labels=5)
    model.config.pad_token_id = 0
    perturb(model, 0.02, 6)
    model.save_pretrained(work.tuned)


@pytest.mark.parametrize("name", HEADS)
def test_classifier_made_of_a_language_model(name: str, tmp_path: Path) -> None:
    """A new head is saved whole, the old one is dropped, and PEFT adapts the class that has it."""
    base_class, found = HEADS[name]
    work = Tuning(found, tmp_path)
    classifier_of(work, base_class)
    report = work.extract()
    assert any(re.search("score|classifier", t.name) for t in report.saved)
    cls = getattr(transformers, found.model)
    torch.manual_seed(9)
    base = cls.from_pretrained(work.base, dtype=torch.float32, num_labels=5)
    base.config.pad_token_id = 0
    work.check(base.eval())


def test_classifier_by_the_auto_class_and_its_task(tmp_path: Path) -> None:
    """What a model card tells people to do: the task's auto class, then PeftModel."""
    base_class, found = HEADS["llama"]
    work = Tuning(found, tmp_path)
    classifier_of(work, base_class)
    report = work.extract()
    assert "head-dropped" in [n.code for n in report.warnings]
    assert read_json(work.adapter / "adapter_config.json")["task_type"] == "SEQ_CLS"
    torch.manual_seed(9)
    base = AutoModelForSequenceClassification.from_pretrained(work.base, num_labels=5)
    work.check(base.eval())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama-classifier", "vit"])
def test_classifier_with_another_number_of_labels(name: str, tmp_path: Path) -> None:
    """A head of another shape is saved whole, and loads where the base is given as many labels."""
    found = MODELS[name]
    model = found.make()
    perturb(model, 0.1, 5)
    model.save_pretrained(tmp_path / "base")
    cls = getattr(transformers, found.model)
    options = {"dtype": torch.float32, "num_labels": 3, "ignore_mismatched_sizes": True}
    model = cls.from_pretrained(tmp_path / "base", **options)
    perturb(model, 0.02, 6)
    model.save_pretrained(tmp_path / "tuned")
    work = Tuning(found, tmp_path)
    report = work.extract()
    assert "shape-changed" in [n.code for n in report.warnings]
    work.check(cls.from_pretrained(tmp_path / "base", **options).eval())
    assert found.load(tmp_path / "merged").config.num_labels == 3


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[(name, 101) for name in ("llama", "llama-tied", "gpt2", "gpt-neox", "opt", "gemma")],
        ("llama", 91),
        ("llama-tied", 91),
    ],
)  # fmt: skip
def test_vocabulary_of_another_size(name: str, size: int, tmp_path: Path) -> None:
    """PEFT loads on the base once it is resized, and merge gives the new vocabulary at once."""
    found = MODELS[name]
    model = found.make()
    perturb(model, 0.1, 5)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(size)
    perturb(model, 0.02, 6)
    model.save_pretrained(tmp_path / "tuned")
    work = Tuning(replace(found, inputs=few), tmp_path)
    report = work.extract()
    assert "shape-changed" in [n.code for n in report.warnings]
    base = found.load(work.base)
    base.resize_token_embeddings(size)
    work.check(base, *WARNINGS.get(name, ()))
    assert found.load(tmp_path / "merged").config.vocab_size == size


def test_masked_head_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """The bias of such a head has no place in an adapter; the refusal names it."""
    found = MODELS["bert-masked"]
    model = found.make()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(MatchError, match=r"cls\.predictions\.bias"):
        Tuning(found, tmp_path).extract()


def few() -> Inputs:
    """Token ids that all vocabularies have."""
    torch.manual_seed(3)
    return {"input_ids": torch.randint(3, 91, (2, 10))}


@pytest.mark.parametrize("tied", ["base", "tuned"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPTNeoX"])
def test_one_side_ties_its_head(name: str, tied: str, tmp_path: Path) -> None:
    """A head that was cut loose, or became the embedding, is the tuned model's head again."""
    for side in ("base", "tuned"):
        found = causal(name, tie_word_embeddings=side == tied)
        model = found.make()
        perturb(model, 0.1, 5)
        if side == "tuned":
            perturb(model, 0.02, 6)
        model.save_pretrained(tmp_path / side)
        heads = {"lm_head.weight", "embed_out.weight"} & set(read(tmp_path / side))
        assert bool(heads) is (side != tied)
    work = Tuning(causal(name), tmp_path)
    work.extract()
    # Not wanted here: the tuned head is another matrix than the embedding.
    untied = ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",)
    work.check(None, *untied if tied == "base" else ())
