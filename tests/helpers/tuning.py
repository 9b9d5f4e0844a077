"""Bases and fine-tunes of every architecture, and what both compute."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

import loratool
from helpers.architectures import (
    ARCHITECTURES,
    CLIP_VISION,
    GPT2,
    GROUPED,
    LABELS,
    SIZES,
    VISION,
    Architecture,
    Inputs,
    causal,
    image,
    image_and_text,
)
from helpers.extracting import SAVED
from loratool import ExtractReport

#: The largest error, as a share of the change in the outputs: some float32 rounding.
EXACT = 1e-4

#: What models of many kinds give; all that a model has of it is compared.
OUTPUTS = ("logits", "logits_per_image", "prediction_logits", "seq_relationship_logits",
           "start_logits", "end_logits", "last_hidden_state")  # fmt: skip


def perturb(model: nn.Module, amount: float, seed: int, only: str = "") -> None:
    """Move all parameters, or those whose names `only` finds; random values stand for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(only, name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
        for name, buffer in model.named_buffers():
            if not only and name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator), alpha=amount)


def computed(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    parts = [found[name].flatten() for name in OUTPUTS if name in found]
    assert parts, f"no known output among {list(found)}"
    return torch.cat(parts)


@dataclass
class Tuning:
    """A base and its fine-tune on disk, and the class that both are loaded with."""

    found: Architecture
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def extract(self, **options: Any) -> ExtractReport:
        """Extract in full, norms, biases and embeddings too, unless asked for less."""
        asked = {"dtype": "float32", "verify": True, **options}
        skip = asked.get("skip", ())
        asked["save"] = [*asked.get("save", ()), *({*SAVED} - {*skip})]
        asked.setdefault("embeddings", "embeddings" not in skip)
        if "rank" not in asked:
            asked.setdefault("energy", 1.0)
        return loratool.extract(self.base, self.tuned, self.adapter, **asked)

    def merged(self) -> PreTrainedModel:
        loratool.merge(self.base, self.adapter, self.folder / "merged", dtype="float32")
        return self.found.load(self.folder / "merged")

    @cached_property
    def expected(self) -> torch.Tensor:
        """The tuned model's outputs."""
        return computed(self.found.load(self.tuned), self.found.inputs())

    def error(self, model: nn.Module, before: torch.Tensor) -> float:
        """How far a model is from the tuned one, over the change from `before` to it."""
        change = (self.expected - before).norm()
        assert change > 1e-3, "tuning changed nothing"
        return float((computed(model, self.found.inputs()) - self.expected).norm() / change)

    def check(self, base: PreTrainedModel | None = None, *allowed: str) -> PeftModel:
        """PEFT and merge both give the tuned model's outputs; the PEFT model is returned.

        `base` is given where the base must be loaded in a way of its own. `allowed` are the
        beginnings of the warnings that PEFT may show.
        """
        base = base or self.found.load(self.base)
        before = computed(base, self.found.inputs())
        model = load_peft(base, self.adapter, *allowed)
        errors = {
            "merge": self.error(self.merged(), before),
            "PEFT": self.error(model, before),
        }
        assert max(errors.values()) < EXACT, errors
        return model


def tune(
    folder: Path, found: Architecture, only: str = "", dtype: torch.dtype = torch.float32
) -> Tuning:
    """Write a model and a fine-tune of it in which all that `only` finds has moved."""
    model = found.make()
    perturb(model, 0.1, 5)
    model.save_pretrained(folder / "base")
    perturb(model, 0.02, 6, only)
    nn.Module.to(model, dtype).save_pretrained(folder / "tuned")
    return Tuning(found, folder)


def load_peft(base: PreTrainedModel, adapter: Path, *allowed: str) -> PeftModel:
    """Load as users do; nothing may be missing, unexpected or warned of but what is `allowed`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter).eval()
    texts = [
        str(w.message)
        for w in caught
        if not issubclass(w.category, (DeprecationWarning, FutureWarning))
    ]
    assert [t for t in texts if not t.startswith(allowed)] == []
    result: Any = set_peft_model_state_dict(model, load_peft_weights(str(adapter)))
    assert list(result.unexpected_keys) == []
    return model


def mel() -> Inputs:
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def experts(name: str, **settings: Any) -> Architecture:
    return causal(name, {**GROUPED, "num_experts_per_tok": 2, **settings})


MASKED = {**SIZES, "embedding_size": 24}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], **LABELS}
SPLIT = {"moe_intermediate_size": 24, "num_experts": 4}
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
SIGLIP = {"text_config": SIZES, "vision_config": CLIP_VISION}

MODELS: dict[str, Architecture] = {
    **{name: a for name, a in ARCHITECTURES.items()
       if "dora" not in name and name not in ("t5", "t5-gated", "bart", "mixtral-attention")},
    "llama-tied": causal("Llama", tie_word_embeddings=True),
    "qwen2-tied": causal("Qwen2", tie_word_embeddings=True),
    "gpt-neox-tied": causal("GPTNeoX", SIZES, tie_word_embeddings=True),
    "llama-bare": Architecture("LlamaModel", "LlamaConfig", GROUPED),
    "gpt2-bare": Architecture("GPT2Model", "GPT2Config", GPT2),
    "bert-bare": Architecture("BertModel", "BertConfig", SIZES),
    "vit-bare": Architecture("ViTModel", "ViTConfig", VISION, image),
    "codegen": causal("CodeGen", {**GPT2, "rotary_dim": 4}),
    "glm": causal("Glm", head_dim=8),
    "nemotron": causal("Nemotron"),
    "persimmon": causal("Persimmon", SIZES),
    "xglm": causal("XGLM", {"vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
                            "attention_heads": 4, "max_position_embeddings": 40}),
    "mamba": causal("Mamba", {"vocab_size": 96, "hidden_size": 32, "state_size": 4,
                              "num_hidden_layers": 2}),
    "mixtral": experts("Mixtral", num_local_experts=4),
    "qwen2-moe": experts("Qwen2Moe", shared_expert_intermediate_size=24, **SPLIT),
    "qwen3-moe": experts("Qwen3Moe", head_dim=8, **SPLIT),
    "olmoe": experts("Olmoe", num_experts=4),
    "deepseek-v3": experts("DeepseekV3", **DEEPSEEK),
    "granite-moe": experts("GraniteMoe", num_local_experts=4),
    "phi-moe": experts("Phimoe", num_local_experts=4),
    "gpt-oss": experts("GptOss", num_local_experts=4, head_dim=8,
                       layer_types=["full_attention"] * 2),
    "bert-pretraining": Architecture("BertForPreTraining", "BertConfig", SIZES),
    "bert-answers": Architecture("BertForQuestionAnswering", "BertConfig", SIZES),
    "roberta-tagger": Architecture(
        "RobertaForTokenClassification", "RobertaConfig", {**SIZES, **LABELS}
    ),
    "roberta-masked": Architecture("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "distilbert-masked": Architecture(
        "DistilBertForMaskedLM", "DistilBertConfig", ARCHITECTURES["distilbert"].settings
    ),
    "electra-masked": Architecture("ElectraForMaskedLM", "ElectraConfig", MASKED),
    "albert-masked": Architecture("AlbertForMaskedLM", "AlbertConfig", MASKED),
    "deberta-masked": Architecture("DebertaV2ForMaskedLM", "DebertaV2Config", SIZES),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification", "ModernBertConfig",
        {**SIZES, **LABELS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "resnet": Architecture(
        "ResNetForImageClassification", "ResNetConfig", {**RESNET, "layer_type": "basic"}, mel
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, **LABELS},
        mel,
    ),
    "swin": Architecture(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
         "num_heads": [2, 2], "window_size": 4, **LABELS},
        image,
    ),
    "siglip": Architecture("SiglipModel", "SiglipConfig", SIGLIP, image_and_text),
}  # fmt: skip

#: Harmless: transformers 5 has one tensor for the experts, and PEFT rewrites the config for it.
FUSED = tuple(
    f"The following {kind} keys did not match any targeted module and were ignored"
    for kind in ("rank_pattern", "alpha_pattern")
)
#: Harmless: the head is tied through the factors, which PEFT does not call tied.
TYING = ("You have requested `ensure_weight_tying`, but no tied modules are added",)
WARNINGS: dict[str, tuple[str, ...]] = {
    # Harmless: lm_head is a Linear among modules that store their weights [in, out].
    **dict.fromkeys(
        ("gpt2", "openai-gpt"),
        ("fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",),
    ),
    **dict.fromkeys(("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "phi-moe"),
                    FUSED),
    **dict.fromkeys(("bert-masked", "bert-pretraining", "roberta-masked", "deberta-masked",
                     "albert-masked", "distilbert-masked", "electra-masked"), TYING),
}  # fmt: skip
