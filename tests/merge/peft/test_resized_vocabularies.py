"""Adapters that resize the vocabulary, for every architecture whose names loratool lists."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.models import read
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import MatchError
from loratool.models.layouts import names

OLD, NEW = 100, 104
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, by the start of its name, the class's end, and tiny sizes."""

    stem: str
    end: str
    sizes: dict[str, Any] = field(default_factory=dict)

    def make(self) -> PreTrainedModel:
        torch.manual_seed(0)
        stem = self.stem
        config = getattr(transformers, f"{stem}Config")(vocab_size=OLD, **self.sizes)
        return getattr(transformers, stem + self.end)(config)


ARCHITECTURES = {
    "llama": Architecture("Llama", "ForCausalLM", DECODER),
    "qwen2": Architecture("Qwen2", "ForCausalLM", DECODER),
    "gpt2": Architecture("GPT2", "LMHeadModel", GPT),
    "openai-gpt": Architecture("OpenAIGPT", "LMHeadModel", GPT),
    "opt": Architecture("OPT", "ForCausalLM", {
        "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    "bloom": Architecture("Bloom", "ForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "gpt_neox": Architecture("GPTNeoX", "ForCausalLM", ENCODER),
    "gpt_bigcode": Architecture("GPTBigCode", "ForCausalLM", GPT),
    "falcon": Architecture("Falcon", "ForCausalLM", {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "gemma": Architecture("Gemma", "ForCausalLM", {**DECODER, "head_dim": 8}),
    "gemma2": Architecture("Gemma2", "ForCausalLM", {**DECODER, "head_dim": 8}),
    "mamba": Architecture("Mamba", "ForCausalLM", {
        "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    "mamba2": Architecture("Mamba2", "ForCausalLM", {
        "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 8,
        "n_groups": 1}),
    "falcon_mamba": Architecture("FalconMamba", "ForCausalLM", {
        "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    "modernbert": Architecture("ModernBert", "ForMaskedLM", {
        **ENCODER, **MARKS, "cls_token_id": 1, "sep_token_id": 2}),
    "modernbert-headless": Architecture("ModernBert", "Model", {
        **ENCODER, **MARKS, "cls_token_id": 1, "sep_token_id": 2}),
    "bert": Architecture("Bert", "ForMaskedLM", ENCODER),
    "bert-headless": Architecture("Bert", "Model", ENCODER),
    "roberta": Architecture("Roberta", "ForMaskedLM", ENCODER),
    "xlm-roberta": Architecture("XLMRoberta", "ForMaskedLM", ENCODER),
    "camembert": Architecture("Camembert", "ForMaskedLM", ENCODER),
    "mpnet": Architecture("MPNet", "ForMaskedLM", ENCODER),
    "distilbert": Architecture("DistilBert", "ForMaskedLM", {
        "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
    "electra": Architecture("Electra", "ForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "deberta": Architecture("Deberta", "ForMaskedLM", ENCODER),
    "deberta-v2": Architecture("DebertaV2", "ForMaskedLM", ENCODER),
    "albert": Architecture("Albert", "ForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "whisper": Architecture("Whisper", "ForConditionalGeneration", {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
        "decoder_start_token_id": 1, **MARKS}),
}  # fmt: skip
MOBILE = Architecture("MobileBert", "ForMaskedLM", {
    "hidden_size": 24, "embedding_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intra_bottleneck_size": 8, "num_feedforward_networks": 1,
})  # fmt: skip


def test_every_listed_architecture_is_tried() -> None:
    """An architecture that gets a row in the lists of heads and ties must be tried here too."""
    listed = {*names.TIED_BY_DEFAULT, *names.ROOTS}
    assert listed - {"mobilebert"} <= ARCHITECTURES.keys()


def name_of(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def grown(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Base and adapter in `folder`: four tokens more, in the embedding and in an untied head."""
    model.save_pretrained(folder / "base")
    model.resize_token_embeddings(NEW)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    saved = [name_of(model, embedding).rpartition(".")[2]]
    if head is not None and head.weight is not embedding.weight:
        saved.append(name_of(model, head).rpartition(".")[2])
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    target = name_of(model, next(m for m in layers if m is not head))
    lora = LoraConfig(r=2, target_modules=[target], modules_to_save=saved)
    trained = get_peft_model(model, lora)
    for name, value in trained.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(value, std=0.3)
    trained.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return trained


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_resized_vocabulary_gives_a_model_that_loads(name: str, tmp_path: Path) -> None:
    """config.json has the new number of tokens, nothing keeps the old one, and every tensor is what
    PEFT has in memory, but for a head that PEFT unties while it trains."""
    kind = ARCHITECTURES[name]
    trained = grown(kind.make(), tmp_path)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="base")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == NEW

    merged = type(trained.get_base_model()).from_pretrained(tmp_path / "out").eval()
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    wanted = trained.merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        if tied and key == f"{name_of(merged, head)}.weight":
            assert torch.equal(value, embedding.weight)
        else:
            assert torch.allclose(value, wanted[key], atol=1e-6), key
    assert len(embedding.weight) == NEW


def test_a_head_with_a_column_per_token_is_refused(tmp_path: Path) -> None:
    """MobileBERT's has one, which PEFT does not save: no file says what is in the new columns."""
    grown(MOBILE.make(), tmp_path)
    with pytest.raises(MatchError, match=r"cls\.predictions\.dense\.weight") as caught:
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "modules_to_save" in caught.value.hint


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_bias_that_grew_is_told_proven_and_taken_back(name: str, tmp_path: Path) -> None:
    """The zeros that a head's bias ends in are a warning, verify expects them, and unmerge gives
    the base back bit for bit."""
    grown(ARCHITECTURES[name].make(), tmp_path)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    report = loratool.merge(base, adapter, out, dtype="base", reversible=True)
    (notice,) = [n for n in report.warnings if n.code == "head-bias-resized"]
    bias = read(out)[notice.where]
    assert bias.shape == (NEW,)
    assert torch.equal(bias[:OLD], read(base)[notice.where])
    assert not bias[OLD:].any()
    assert loratool.verify(out, base, adapter).verdict == "yes"
    loratool.unmerge(out, adapter, tmp_path / "back")
    before, after = read(base), read(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "name", ["llama", "openai-gpt", "mamba", "modernbert-headless", "bert-headless"]
)
def test_extract_saves_a_grown_vocabulary_whole(name: str, tmp_path: Path) -> None:
    """A fine-tune with more tokens gives an adapter that holds the embedding whole; merged, it is
    the fine-tune."""
    model = ARCHITECTURES[name].make()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(NEW)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value += 0.02 * torch.randn(len(value), 1) @ torch.randn(1, value.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    loratool.extract(
        tmp_path / "base", tmp_path / "tuned", adapter, rank=2, embeddings=True, dtype="float32"
    )
    loratool.merge(tmp_path / "base", adapter, out, dtype="base")
    tuned, merged = read(tmp_path / "tuned"), read(out)
    assert tuned.keys() == merged.keys()
    assert all(torch.allclose(tuned[key], merged[key], atol=1e-4) for key in tuned)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == NEW
