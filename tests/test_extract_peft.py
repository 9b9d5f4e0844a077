"""An extracted adapter is the fine-tune: PEFT loads it on the base without a complaint, and the
model then computes what the tuned one computes; so does the model that `merge` makes of the two.

At full rank nothing may be lost, so errors are shares of the change that tuning made. One tiny
model per architecture; all of its parameters move, buffers of batch norms too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES
from models import read, read_json
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from test_fixtures import held_out_loss
from test_merge_architectures import (
    ARCHITECTURES,
    BART,
    CLIP_VISION,
    GPT2,
    GROUPED,
    LABELS,
    SIZES,
    T5,
    VISION,
    Architecture,
    Inputs,
    causal,
    image,
    image_and_text,
    pair_of_texts,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import loratool
from loratool import ExtractReport
from loratool.errors import MatchError

#: The largest error, as a share of the change in the outputs: some float32 rounding.
EXACT = 1e-4

#: What models of many kinds give; all that a model has of it is compared.
OUTPUTS = ("logits", "logits_per_image", "prediction_logits", "seq_relationship_logits",
           "start_logits", "end_logits", "last_hidden_state")  # fmt: skip


# Tiny base models, fine-tunes of them, and what both compute.


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
        """Extract in full, unless asked for less."""
        asked = {"dtype": "float32", "verify": True, **options}
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


def adapted(model: PeftModel, kind: type) -> set[str]:
    """The paths of all modules of a kind that PEFT made: layers with factors, or saved modules."""
    own = model.get_base_model()
    return {name for name, module in own.named_modules() if isinstance(module, kind)}


# Every architecture.


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
    rf"The following {kind} keys did not match any targeted module and were ignored: "
    r"['.*\\.gate_up_proj']"
    for kind in ("rank_pattern", "alpha_pattern")
)
#: Harmless: the head is tied through the factors, which PEFT does not call tied.
TYING = ("You have requested `ensure_weight_tying`, but no tied modules are added",)
WARNINGS: dict[str, tuple[str, ...]] = {
    # Harmless: lm_head is a Linear among modules that store their weights [in, out].
    "gpt2": ("fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",),
    **dict.fromkeys(("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "phi-moe"),
                    FUSED),
    **dict.fromkeys(("bert-masked", "bert-pretraining", "roberta-masked", "deberta-masked",
                     "albert-masked", "distilbert-masked", "electra-masked"), TYING),
}  # fmt: skip


#: Which PEFT 0.21 loads wrongly or not at all under transformers 5, and the warning that says so.
WARNED = {
    **dict.fromkeys(("qwen2-moe", "deepseek-v3"), "experts-in-peft"),
    **dict.fromkeys(("granite-moe", "phi-moe", "llava", "gemma3-images", "qwen2-vl"),
                    "names-in-memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_what_peft_may_not_load_is_said_and_merges(name: str, tmp_path: Path) -> None:
    """Where names or experts differ in memory, a warning says so, and merge gives the tuned one."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(uniform="experts" in str(sorted(read(work.base))))
    assert WARNED[name] in [notice.code for notice in report.warnings]
    before = computed(work.found.load(work.base), work.found.inputs())
    assert work.error(work.merged(), before) < EXACT


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WARNED])
def test_extracted_adapter_gives_the_tuned_model(name: str, tmp_path: Path) -> None:
    """Every parameter of a fine-tune is in its adapter, in a place where PEFT puts it back."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(uniform="experts" in str(sorted(read(work.base))))
    assert report.unchanged == 0
    assert report.left == []
    work.check(None, *WARNINGS.get(name, ()))


#: Models in which encoder, decoder and head share a matrix, and the name of that matrix.
SHARED = {
    "t5": (ARCHITECTURES["t5"], "shared"),
    "t5-gated": (ARCHITECTURES["t5-gated"], "shared"),
    "mt5": (Architecture("MT5ForConditionalGeneration", "MT5Config", T5, pair_of_texts), "shared"),
    "bart": (ARCHITECTURES["bart"], "model.shared"),
    "marian": (Architecture("MarianMTModel", "MarianConfig", BART, pair_of_texts), "model.shared"),
}


@pytest.mark.parametrize("name", SHARED)
def test_matrix_with_three_places_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """An adapter has no place for a change of a matrix that encoder, decoder and head share."""
    found, path = SHARED[name]
    work = tune(tmp_path, found)
    with pytest.raises(MatchError) as caught:
        work.extract()
    assert f"{path}.weight" in caught.value.message
    assert f"--exclude {path}" in caught.value.hint
    assert not work.adapter.exists()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *[(name, "exclude") for name in SHARED],
        ("t5", "skip"),
        ("bart", "skip"),
        ("t5", "unchanged"),
    ],
)
def test_all_but_the_shared_matrix_is_extracted(name: str, option: str, tmp_path: Path) -> None:
    """Where the shared matrix is left out, or did not change, the rest is the tuned model's."""
    found, path = SHARED[name]
    # Heads of their own, position embeddings and relative biases are embeddings too.
    only = "" if option == "exclude" else "(layer|layers|block)[.]"
    rest = f"^(?!.*(relative_attention_bias|{re.escape(path)}))(?=.*{only})"
    work = tune(tmp_path, found, "" if option == "exclude" else rest)
    options: dict[str, Any] = {"skip": {"skip": ["embeddings"]}, "exclude": {"exclude": [path]}}
    report = work.extract(**options.get(option, {}))
    if option == "exclude":
        assert [t.name for t in report.left] == [f"{path}.weight"]
        model = found.load(work.tuned)
        given = read(work.base)[f"{path}.weight"]
        model.get_parameter(f"{path}.weight").data.copy_(given)
        model.save_pretrained(tmp_path / "expected")
        work = OtherTuned(found, tmp_path)
    work.check()


class OtherTuned(Tuning):
    """A fine-tune of which one matrix was left out."""

    @property
    def tuned(self) -> Path:
        return self.folder / "expected"


def test_experts_with_ranks_of_their_own_are_warned_of(tmp_path: Path) -> None:
    """PEFT needs one rank for all experts of a layer, and the report says how to get that."""
    report = tune(tmp_path, MODELS["mixtral"]).extract(energy=0.8)
    notice = next(n for n in report.warnings if n.code == "ranks-of-experts")
    assert "--uniform" in notice.message


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_of_one_low_rank_are_the_same_in_peft_and_merged(name: str, tmp_path: Path) -> None:
    """A truncated adapter of experts means in PEFT what it means in merge."""
    work = tune(tmp_path, MODELS[name])
    work.extract(rank=4)
    base = work.found.load(work.base)
    inputs = work.found.inputs()
    before = computed(base, inputs)
    model = load_peft(base, work.adapter, *FUSED)
    found, expected = computed(model, inputs), computed(work.merged(), inputs)
    assert (found - expected).norm() < EXACT * (expected - before).norm()
    assert 0.02 < work.error(model, before) < 0.98


# Names and heads that base and tuned model do not share.


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


# Vocabularies and ties.


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


# Fine-tunes in which little changed.

DEEP: dict[str, Architecture] = {
    "llama": causal("Llama", num_hidden_layers=12),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_layer": 12}),
    "bert": Architecture("BertModel", "BertConfig", {**SIZES, "num_hidden_layers": 12}),
}
PARTS = {
    "one layer": r"\.1\.",
    "layers 1 and 11": r"\.(1|11)\.",
    "all but layer 11": r"\.\d+\.(?<!\.11\.)",
    "all but layer 1": r"\.\d+\.(?<!\.1\.)",
    "one module": r"\.1\.(mlp\.up_proj|mlp\.c_fc|intermediate\.dense)\.weight$",
    "one kind of module": r"(up_proj|c_fc|attention\.self\.query)\.weight$",
    "one kind in two layers": r"\.(0|10)\..*(up_proj|c_fc|output\.dense)\.weight$",
    "embedding": r"(embed_tokens|wte|word_embeddings)\.weight$",
}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *[("llama", part) for part in PARTS],
        ("gpt2", "layers 1 and 11"),
        ("gpt2", "one kind in two layers"),
        ("gpt2", "embedding"),
        ("bert", "all but layer 11"),
        ("bert", "one module"),
    ],
)
def test_nothing_but_what_changed_is_adapted(name: str, part: str, tmp_path: Path) -> None:
    """PEFT adapts the modules that changed and no other, and layer 1 is not layer 11."""
    only = PARTS[part]
    work = tune(tmp_path, DEEP[name], only)
    report = work.extract()
    odd = (name, part) == ("gpt2", "embedding")
    model = work.check(None, *WARNINGS["gpt2"] if odd else ())
    changed = {
        path.rpartition(".")[0]
        for path, parameter in work.found.make().named_parameters(remove_duplicate=False)
        if re.search(only, path) and parameter.ndim == 2
    }
    if odd:
        changed.add("lm_head")
    assert adapted(model, LoraLayer) == changed
    saved = {t.name.rpartition(".")[0] for t in report.saved} - changed
    assert adapted(model, ModulesToSaveWrapper) <= saved


@pytest.mark.parametrize("option", ["skip", "unchanged"])
@pytest.mark.parametrize(
    "name", ["bert", "llama-classifier", "roberta-tagger", "bert-answers", "vit"]
)
def test_classifier_that_stays_the_base_s(name: str, option: str, tmp_path: Path) -> None:
    """PEFT wants the head of a classification task in the file, changed or not."""
    work = tune(tmp_path, MODELS[name], "" if option == "skip" else r"layers?\.")
    work.extract(**{"skip": ["heads"]} if option == "skip" else {})
    model = load_peft(work.found.load(work.base), work.adapter)
    if option == "unchanged":
        before = computed(work.found.load(work.base), work.found.inputs())
        assert work.error(model, before) < EXACT


def test_layer_that_only_the_skipped_one_resembles(tmp_path: Path) -> None:
    """What the user excludes is not adapted, though a layer of nearly that name is."""
    work = tune(tmp_path, DEEP["llama"])
    report = work.extract(exclude=["model.layers.1.*"])
    model = load_peft(work.found.load(work.base), work.adapter)
    layers = adapted(model, LoraLayer) | adapted(model, ModulesToSaveWrapper)
    assert not any(path.startswith("model.layers.1.") for path in layers)
    for layer in (0, 2, 10, 11):
        assert sum(path.startswith(f"model.layers.{layer}.") for path in layers) == 9
    assert all(t.name.startswith("model.layers.1.") for t in report.left)


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("qwen2", r"layers\.0\.self_attn\.q_proj\.bias$"),
        ("qwen2", r"\.bias$"),
        ("gpt2", r"h\.1\.mlp\.c_fc\.bias$"),
        ("bert-bare", r"layer\.1\.output\.dense\.bias$"),
        ("opt", r"layers\.1\.fc1\.bias$"),
        ("clip", r"layers\.0\.mlp\.fc1\.bias$"),
    ],
)
def test_bias_of_a_layer_whose_weight_stayed(name: str, biases: str, tmp_path: Path) -> None:
    """A bias needs no factors beside it; the layers that have some are elsewhere."""
    weights = r"layers?\.1\..*(up_proj|query|out_proj)\.weight$|h\.0\.attn\.c_attn\.weight$"
    work = tune(tmp_path, MODELS[name], f"{biases}|{weights}")
    report = work.extract()
    assert any(re.search(biases, t.name) for t in report.saved)
    work.check()


# Files and ranks.


def as_bin(folder: Path) -> None:
    torch.save(read(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [as_bin, as_shards])
def test_bases_and_tuned_models_in_other_files(
    store: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    """How a base is stored, and in which dtype the tuned model is, makes no difference."""
    work = tune(tmp_path, MODELS["llama"], dtype=dtype)
    store(work.base)
    work.extract()
    work.check()


@pytest.mark.parametrize("name", ["llama", "gpt2", "clip", "resnet", "bert", "whisper", "albert"])
def test_ranks_of_their_own_load(name: str, tmp_path: Path) -> None:
    """With rank_pattern each module has in PEFT the rank that the report states."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(energy=0.7)
    assert len({m.rank for m in report.modules}) > 1
    base = work.found.load(work.base)
    inputs = work.found.inputs()
    before = computed(base, inputs)
    model = load_peft(base, work.adapter, *WARNINGS.get(name, ()))
    own = model.get_base_model()
    for module in report.modules:
        layer = own.get_submodule(module.path)
        assert isinstance(layer, LoraLayer)
        assert (layer.r["default"], layer.scaling["default"]) == (module.rank, 1.0)
    found, expected = computed(model, inputs), computed(work.merged(), inputs)
    assert (found - expected).norm() < EXACT * (expected - before).norm()


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama", ""), ("clip", ""), ("llama-tied", "model.embed_tokens"), ("gpt2", "*.wte")],
)
def test_peft_s_own_merge_gives_the_tuned_weights(name: str, whole: str, tmp_path: Path) -> None:
    """merge_and_unload gives the tuned model, for tied matrices where they are saved whole.

    PEFT's merge (0.21.2) adds the factors of a tied matrix twice, those of its own training too.
    """
    work = tune(tmp_path, MODELS[name])
    work.extract(save=[whole] if whole else [])
    base = work.found.load(work.base)
    before = computed(base, work.found.inputs())
    merged: Any = load_peft(base, work.adapter).merge_and_unload()
    assert work.error(merged, before) < EXACT


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_error_of_the_report_is_that_of_the_weights(name: str, tmp_path: Path) -> None:
    """The weights that PEFT has differ from the tuned ones by the error that was stated."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(rank=6)
    base, tuned = work.found.load(work.base), work.found.load(work.tuned)
    given = {k: v.detach().clone() for k, v in base.named_parameters()}
    model = load_peft(base, work.adapter, *WARNINGS.get(name, ()))
    merged = model.merge_and_unload().state_dict()
    pairs = [(merged[k], given[k], v.detach()) for k, v in tuned.named_parameters()]
    off = sum(float((found - v).double().square().sum()) for found, _, v in pairs)
    change = sum(float((before - v).double().square().sum()) for _, before, v in pairs)
    assert (off / change) ** 0.5 == pytest.approx(report.error, rel=1e-3)
    assert report.verified == pytest.approx(report.error, rel=1e-3)


# The trained fixtures.


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Losses on held-out text of the base, the tuned model and adapters of several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    text = folder / "part.txt"
    text.write_bytes((FIXTURES / "heldout.txt").read_bytes()[: 64 * 256 + 1])

    def load(name: str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            FIXTURES / name, dtype=torch.float32
        )
        return model

    result = {side: held_out_loss(load(side), text) for side in ("base", "tuned")}
    asked: dict[str, dict[str, Any]] = {str(r): {"rank": r} for r in (1, 4, 16, 64)}
    for name, options in {**asked, "full": {"energy": 1.0}}.items():
        loratool.extract(FIXTURES / "base", FIXTURES / "tuned", folder / name, **options)
        result[name] = held_out_loss(load_peft(load("base"), folder / name), text)
    return result


def test_loss_falls_with_the_rank(losses: dict[str, float]) -> None:
    """Each larger adapter of a real fine-tune is nearer to it, on text that none has seen."""
    row = [losses[name] for name in ("base", "1", "4", "16", "64")]
    assert all(before > after for before, after in pairwise(row)), row
    assert abs(losses["64"] - losses["tuned"]) < 0.05 * (losses["base"] - losses["tuned"])


def test_full_rank_has_the_loss_of_the_tuned_model(losses: dict[str, float]) -> None:
    """In float16 factors of full rank, nothing of a real fine-tune is lost."""
    assert losses["full"] == pytest.approx(losses["tuned"], abs=1e-3)
