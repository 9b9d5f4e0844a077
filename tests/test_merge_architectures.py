"""Merging keeps the function: a merged checkpoint, loaded as transformers loads any other, gives
the outputs of the PEFT model that it was merged from.

One tiny model per architecture, saved by transformers, so that the base has the names it has on the
Hub. Where loratool cannot place an adapter, it must say so; a merge that loses something fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Trained, close, lora, train_on_disk, write_adapter
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

import loratool
from loratool.errors import AdapterError, LoraToolError, MatchError

Inputs = dict[str, torch.Tensor]

#: Sizes that nearly all text configurations share.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}


def text() -> Inputs:
    torch.manual_seed(3)
    return {"input_ids": torch.randint(3, 96, (2, 10))}


def pair_of_texts() -> Inputs:
    torch.manual_seed(4)
    return {**text(), "decoder_input_ids": torch.randint(3, 96, (2, 7))}


def image() -> Inputs:
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def image_and_text() -> Inputs:
    return {**image(), **text()}


def sound() -> Inputs:
    torch.manual_seed(3)
    return {"input_values": torch.randn(2, 400)}


def spectrogram() -> Inputs:
    torch.manual_seed(3)
    features = torch.randn(2, 8, 40)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, 96, (2, 7))}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, its configuration, and what to feed it."""

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Inputs] = text
    options: dict[str, Any] = field(default_factory=dict)
    #: The linear layers to adapt; None for all but the head.
    targets: list[str] | None = None

    def make(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        model: PreTrainedModel = getattr(transformers, self.model)(config)
        return model.eval()

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a merged model, with every weight from the file and none made up."""
        cls = getattr(transformers, self.model)
        model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"], f"not in the output: {info['missing_keys']}"
        loaded: PreTrainedModel = model.eval()
        return loaded

    def lora(self) -> LoraConfig:
        config = lora(lora_alpha=2, **self.options)
        config.target_modules = set(self.targets) if self.targets else "all-linear"
        return config


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The logits, or what a model without logits gives."""
    with torch.no_grad():
        found = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in found:
            value: torch.Tensor = found[name]
            return value
    raise AssertionError(f"no known output among {list(found)}")


def causal(name: str, settings: dict[str, Any] = GROUPED, **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**settings, **more})


LABELS = {"num_labels": 5}
CLASSIFIER = {"options": {"task_type": "SEQ_CLS"}}
DORA = {"use_dora": True, "use_rslora": True}
GPT2 = {"vocab_size": 96, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
DISTILBERT = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
VISION = {**SIZES, "image_size": 16, "patch_size": 8, **LABELS}
CLIP_TEXT = {**SIZES, "projection_dim": 16}
CLIP_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
WAV2VEC2 = {**SIZES, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}  # fmt: skip

ARCHITECTURES = {
    "llama": causal("Llama"),
    "llama-dora": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED, options=DORA),
    "llama-biased": causal("Llama", attention_bias=True, mlp_bias=True),
    "mistral": causal("Mistral"),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3", head_dim=8),
    "gemma": causal("Gemma", head_dim=8),
    "gemma2": causal("Gemma2", head_dim=8),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}
    ),
    "phi": causal("Phi"),
    "phi3": causal("Phi3"),
    "cohere": causal("Cohere"),
    "stablelm": causal("StableLm"),
    "olmo2": causal("Olmo2"),
    "granite": causal("Granite"),
    "starcoder2": causal("Starcoder2"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-dora": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, options=DORA),
    "openai-gpt": Architecture("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "gpt-bigcode": Architecture("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    "gpt-neox": causal("GPTNeoX", SIZES),
    "gptj": causal("GPTJ", {**GPT2, "rotary_dim": 4}),
    "gpt-neo": causal(
        "GPTNeo", SIZES, attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4
    ),
    "opt": causal("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": causal("Bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "falcon": causal("Falcon", SIZES),
    "falcon-new": causal("Falcon", GROUPED, new_decoder_architecture=True, num_kv_heads=2),
    "mpt": causal("Mpt", {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2,
                          "max_seq_len": 40}),
    "llama-classifier": Architecture(
        "LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, **LABELS}, **CLASSIFIER
    ),
    "bert": Architecture(
        "BertForSequenceClassification", "BertConfig", {**SIZES, **LABELS}, **CLASSIFIER
    ),
    "bert-tagger": Architecture(
        "BertForTokenClassification", "BertConfig", {**SIZES, **LABELS},
        options={"task_type": "TOKEN_CLS"}, targets=["query", "key", "value", "dense"],
    ),
    "bert-masked": Architecture("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": Architecture(
        "RobertaForSequenceClassification", "RobertaConfig", {**SIZES, **LABELS}, **CLASSIFIER
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {**DISTILBERT, **LABELS}, **CLASSIFIER,
        targets=["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**SIZES, **LABELS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        **CLASSIFIER,
    ),
    "electra": Architecture(
        "ElectraForSequenceClassification", "ElectraConfig",
        {**SIZES, **LABELS, "embedding_size": 24}, **CLASSIFIER,
    ),
    "albert": Architecture(
        "AlbertForSequenceClassification", "AlbertConfig",
        {**SIZES, **LABELS, "embedding_size": 24}, **CLASSIFIER,
    ),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, pair_of_texts),
    "t5-gated": Architecture(
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, pair_of_texts,
    ),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", BART, pair_of_texts),
    "whisper": Architecture(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, spectrogram
    ),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", VISION, image),
    "beit": Architecture("BeitForImageClassification", "BeitConfig", VISION, image),
    "dinov2": Architecture(
        "Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, image
    ),
    "clip": Architecture(
        "CLIPModel", "CLIPConfig",
        {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16},
        image_and_text,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2, sound,
        targets=["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
    ),
    "mixtral-attention": Architecture(
        "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4},
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "llama", **GROUPED}, "image_token_index": 95,
         "vision_config": {"model_type": "clip_vision_model", **CLIP_VISION}},
    ),
    "gemma3-images": Architecture(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": {**GROUPED, "head_dim": 8}, "vision_config": CLIP_VISION,
         "mm_tokens_per_image": 4, "image_token_id": 95},
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}},
    ),
}  # fmt: skip

#: Layouts that loratool cannot place yet; a merge must say so, never lose a delta.
NOT_PLACED = {"llava", "gemma3-images", "qwen2-vl"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_checkpoint_gives_the_outputs_of_the_peft_model(name: str, tmp_path: Path) -> None:
    """Every linear layer of the architecture merges, and the file loads as the same function."""
    found = ARCHITECTURES[name]
    trained = train_on_disk(tmp_path, found.make(), found.lora())
    if name in NOT_PLACED:
        refuse(trained, MatchError)
    else:
        check(found, trained)


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


def test_stack_of_experts_is_refused(tmp_path: Path) -> None:
    """PEFT adapts Mixtral's experts as bare parameters, which has no place in the file yet."""
    settings = {**GROUPED, "num_local_experts": 4}
    found = Architecture("MixtralForCausalLM", "MixtralConfig", settings)
    refuse(train_on_disk(tmp_path, found.make(), found.lora()), AdapterError)


# One matrix for input and output: adapting either leaves the other alone, in PEFT's forward pass.

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


# Names, heads and biases beside the linear layers.


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
