"""Merged checkpoints of all architectures are the functions of their PEFT models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import (
    ARCHITECTURES,
    DISTILBERT,
    GPT2,
    SIZES,
    VISION,
    Architecture,
    Inputs,
    image,
    text,
)
from helpers.models import Trained, close, lora, train_on_disk, write_adapter
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

import loratool
from loratool.errors import LoraToolError, MatchError


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The logits, or what a model without logits gives."""
    with torch.no_grad():
        found = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in found:
            value: torch.Tensor = found[name]
            return value
    raise AssertionError(f"no known output among {list(found)}")


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_checkpoint_gives_the_outputs_of_the_peft_model(name: str, tmp_path: Path) -> None:
    """Every linear layer of the architecture merges, and the file loads as the same function."""
    found = ARCHITECTURES[name]
    check(found, train_on_disk(tmp_path, found.make(), found.lora()))


def check(found: Architecture, trained: Trained) -> None:
    """Merge, load and compare; the base must not pass for the merged model."""
    out = trained.base.parent / "out"
    loratool.merge(trained.base, trained.adapter, out, dtype="float32")
    inputs = found.inputs()
    expected = outputs(trained.model, inputs)
    assert close(outputs(found.load(out), inputs), expected, 1e-4)
    with trained.model.disable_adapter():
        assert not close(outputs(trained.model, inputs), expected, 1e-3)


def refuse(trained: Trained, error: type[LoraToolError]) -> None:
    """Merging raises `error` and writes nothing."""
    before = sorted(trained.base.parent.iterdir())
    with pytest.raises(error):
        loratool.merge(trained.base, trained.adapter, trained.base.parent / "out")
    assert sorted(trained.base.parent.iterdir()) == before


def check_or_refuse(found: Architecture, trained: Trained) -> None:
    """For what is allowed to be refused: a merge that goes through must be right."""
    try:
        check(found, trained)
    except MatchError:
        assert not (trained.base.parent / "out").exists()


TIED = {
    **{
        name: ARCHITECTURES[name]
        for name in ("llama", "gemma", "gpt2", "gpt-neox", "opt", "bloom", "falcon", "whisper",
                     "t5", "bart", "bert-masked")
    },
    "bert-causal": Architecture("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True}),
    "roberta-masked": Architecture("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "distilbert-masked": Architecture("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT),
    "albert-masked": Architecture(
        "AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 24}
    ),
    "electra-masked": Architecture(
        "ElectraForMaskedLM", "ElectraConfig", {**SIZES, "embedding_size": 24}
    ),
    "deberta-masked": Architecture("DebertaV2ForMaskedLM", "DebertaV2Config", SIZES),
}  # fmt: skip
#: Those that may be refused, because the matrix has more than two places or unusual names.
TIED_AND_REFUSABLE = ("t5", "bart", "bert", "roberta", "distilbert", "albert", "electra",
                      "deberta")  # fmt: skip


@pytest.mark.parametrize("side", ["embedding", "head"])
@pytest.mark.parametrize("name", TIED)
def test_adapter_on_one_of_two_tied_matrices(name: str, side: str, tmp_path: Path) -> None:
    """An adapter on the embedding does not reach the head that is tied to it, nor the reverse."""
    plain = TIED[name]
    found = replace(plain, settings={**plain.settings, "tie_word_embeddings": True})
    model = found.make()
    bias_like_a_trained_one(model)
    wanted = model.get_input_embeddings() if side == "embedding" else model.get_output_embeddings()
    path = next(path for path, module in model.named_modules() if module is wanted)
    trained = train_on_disk(tmp_path, model, replace(found, targets=[path]).lora())
    if name.startswith(TIED_AND_REFUSABLE):
        check_or_refuse(found, trained)
    else:
        check(found, trained)


def bias_like_a_trained_one(model: PreTrainedModel) -> None:
    """Fresh biases are zero, which is also what a lost bias looks like."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.data += torch.linspace(-0.5, 0.5, head.bias.numel())


def adapt_loaded(
    folder: Path, base: PreTrainedModel, found: Architecture, config: LoraConfig, **options: Any
) -> Trained:
    """Adapt another model class than the one the base was saved as, as its users do."""
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    cls = getattr(transformers, found.model)
    model = cls.from_pretrained(
        folder / "base", dtype=torch.float32, ignore_mismatched_sizes=True, **options
    )
    adapter = folder / "adapter"
    return Trained(folder / "base", adapter, write_adapter(adapter, model, config))


def test_gpt2_file_without_prefix_takes_an_adapter_of_the_language_model(tmp_path: Path) -> None:
    """The Hub's GPT-2 file has `h.0…`, adapters have `transformer.h.0…`; they meet."""
    found = ARCHITECTURES["gpt2"]
    headless = replace(found, model="GPT2Model").make()
    check(found, adapt_loaded(tmp_path, headless, found, found.lora()))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_embedding_of_a_file_without_head(name: str, tmp_path: Path) -> None:
    """An adapted embedding does not reach the tied head that only the adapter's model class has."""
    found = {
        "gpt2": replace(ARCHITECTURES["gpt2"], targets=["wte"]),
        "bloom": replace(ARCHITECTURES["bloom"], targets=["word_embeddings"]),
    }[name]
    headless = replace(found, model={"gpt2": "GPT2Model", "bloom": "BloomModel"}[name]).make()
    check_or_refuse(found, adapt_loaded(tmp_path, headless, found, found.lora()))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_adapter_of_the_headless_model_fits_the_language_model(name: str, tmp_path: Path) -> None:
    """An adapter trained on the bare model, without a head, finds its layers in the whole one."""
    found = {
        "gpt2": replace(ARCHITECTURES["gpt2"], model="GPT2Model"),
        "llama": replace(ARCHITECTURES["llama"], model="LlamaModel"),
    }[name]
    check(found, adapt_loaded(tmp_path, ARCHITECTURES[name].make(), found, found.lora()))


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "opt", "bloom", "vit", "wav2vec2", "bart", "clip", "qwen2",
             "bert", "roberta"]
)  # fmt: skip
def test_all_trained_biases_find_their_places(name: str, tmp_path: Path) -> None:
    """bias="all" replaces biases of norms, convolutions and linear layers, whatever their name."""
    found = ARCHITECTURES[name]
    config = found.lora()
    config.bias = "all"
    check(found, train_on_disk(tmp_path, found.make(), config))


#: Base class, class with the new head, and options of the adapter.
NEW_HEADS = {
    "roberta": ("RobertaForMaskedLM", "roberta", {"task_type": "SEQ_CLS"}),
    # PEFT takes names in modules_to_save for endings, so `pre_classifier` is saved as well.
    "distilbert": ("DistilBertForMaskedLM", "distilbert", {"task_type": "SEQ_CLS"}),
    "bert-tagger": ("BertForMaskedLM", "bert-tagger", {"task_type": "TOKEN_CLS"}),
    "vit": ("ViTForImageClassification", "vit", {"modules_to_save": ["classifier"]}),
    "vit-headless": ("ViTModel", "vit", {"modules_to_save": ["classifier"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_HEADS)
def test_new_head_loads_with_its_number_of_labels(name: str, tmp_path: Path) -> None:
    """A head trained for other labels than the base's loads without further arguments."""
    base_class, head, options = NEW_HEADS[name]
    found = replace(ARCHITECTURES[head], options=options)
    settings = {**found.settings, "num_labels": 3}
    base = replace(found, model=base_class, settings=settings).make()
    trained = adapt_loaded(tmp_path, base, found, found.lora(), num_labels=7)
    check(found, trained)
    assert found.load(tmp_path / "out").config.num_labels == 7


def test_square_conv1d_of_a_decoder_in_a_composite_model(tmp_path: Path) -> None:
    """GPT-2 as the decoder of another model keeps its [in, out] layout, square or not."""
    decoder = transformers.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    found = Architecture(
        "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig",
        inputs=lambda: {**image(), "decoder_input_ids": text()["input_ids"]},
    )  # fmt: skip
    adapter = lora(target_modules=r".*decoder.*attn\.c_proj")
    check_or_refuse(found, train_on_disk(tmp_path, model, adapter))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "mistral", "bart", "bert-masked"])
def test_resized_vocabulary_of_other_architectures(name: str, tmp_path: Path) -> None:
    """Embedding and head that grew load with the new vocabulary, or the merge is refused."""
    found = ARCHITECTURES[name]
    found.make().save_pretrained(tmp_path / "base")
    cls = getattr(transformers, found.model)
    model = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(101)
    adapter = tmp_path / "adapter"
    trained = Trained(tmp_path / "base", adapter, write_adapter(adapter, model, found.lora()))
    if name in ("bart", "bert-masked"):
        check_or_refuse(found, trained)
    else:
        check(found, trained)
        assert found.load(tmp_path / "out").config.vocab_size == 101
