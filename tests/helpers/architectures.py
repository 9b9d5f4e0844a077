"""Model classes of transformers, in tiny, with what to feed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import PreTrainedModel

from helpers.models import lora

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
