"""Adapters on tiny models of every class, as PEFT makes them today, in both layouts of the base.

PEFT is the oracle: the merged model loads with the parameters of PEFT's own merge and computes what
PEFT's forward pass computes. A sample runs always, all classes with `-m layouts`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import State, close, read, read_json, write_json
from helpers.tiny.build import Case, Inputs
from helpers.tiny.cases import CASES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import loratool
from loratool.errors import MatchError
from loratool.models.layouts.table import Names

#: Every sort of layout, and the families that most adapters are made for.
SAMPLE = [
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM", "MixtralForCausalLM", "MiniMaxM2ForCausalLM", "GraniteMoeForCausalLM",
    "PhimoeForCausalLM", "NemotronHForCausalLM", "JetMoeForCausalLM", "AriaTextForCausalLM",
    "KimiLinearForCausalLM", "LongcatFlashForCausalLM", "Gemma3ForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "PaliGemmaForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "InternVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "MllamaForConditionalGeneration",
    "VoxtralForConditionalGeneration", "Qwen2AudioForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration", "Kimi_K25ForConditionalGeneration",
    "NomicBertForMaskedLM", "GteForMaskedLM", "JinaEmbeddingsV3Model", "Dinov2Model",
    "ViTForImageClassification", "SwinForImageClassification", "SegformerForImageClassification",
    "DetrForObjectDetection", "VideoMAEModel", "MambaForCausalLM",
    "OlmoHybridForCausalLM", "SeamlessM4TForTextToText", "BlipForConditionalGeneration",
]  # fmt: skip

#: One of each sort, for what depends on the layout alone.
FEW = [
    "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM", "JetMoeForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration", "Kimi_K25ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "NomicBertForMaskedLM", "ViTForImageClassification",
]  # fmt: skip

#: What PEFT cannot wrap, with words of its error.
BEYOND_PEFT = {
    **dict.fromkeys(
        ("NemotronHForCausalLM", "FalconH1ForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM",
         "FalconMambaForCausalLM"),
        "incompatible with Mamba-based models",
    ),
    **dict.fromkeys(
        ("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
        "Target module Qwen3OmniMoeAudioEncoderLayer",
    ),
    **dict.fromkeys(
        ("DeformableDetrForObjectDetection", "RTDetrV2ForObjectDetection",
         "PPDocLayoutV4ForObjectDetection", "DFineForObjectDetection"),
        "get_input_embeddings",
    ),
}  # fmt: skip

#: Where PEFT's forward pass reads a weight past its own layer, so that it computes something else
#: than its own merge; and what masks its input at random.
PAST_THE_LAYER = {
    "JambaForCausalLM": "dt_proj", "WavLMForCTC": "attention", "SiglipModel": "pooling head",
    "MobileBertForMaskedLM": "cls.predictions.dense",
    "ViTMAEModel": "random masks", "LongcatFlashForCausalLM": "experts without weights",
}  # fmt: skip

#: What a merge refuses, with a word of why.
REFUSED = {
    "ZambaForCausalLM": "shared_transf", "ShieldGemma2ForImageClassification": "model.lm_head",
}  # fmt: skip

#: All their matrices are transposed in files (Conv1D), which old adapters of linear layers are not.
CONV1D_ALONE = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"}

#: It asks for a file of voices.
NOT_LOADED = {"Qwen2_5OmniForConditionalGeneration"}


def all_with(sample: list[str]) -> list[object]:
    """All classes, those of the sample without a marker."""
    return [
        pytest.param(name, marks=() if name in sample else (pytest.mark.layouts,))
        for name in CASES
        if name not in NOT_LOADED
    ]


@dataclass
class Trial:
    """A tiny model in both layouts on disk, an adapter, and what PEFT makes of them."""

    case: Case
    folder: Path
    model: PeftModel
    inputs: Inputs | None
    expected: torch.Tensor | None
    untouched: State
    merged: State

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def base(self, layout: str) -> Path:
        return self.folder / layout

    def load(self, folder: Path) -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, self.case.model).from_pretrained(folder)
        return model.eval()


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor | None:
    """The logits, or what a model without logits gives; None where the tiny inputs do not do."""
    try:
        with torch.no_grad():
            found = model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if name in found:
            value: torch.Tensor = found[name]
            return value
    return None


def adapt(name: str, folder: Path) -> tuple[PeftModel, State]:
    """Write the model in both layouts, and an adapter of all that `all-linear` means.

    With the adapted model comes the state before.
    """
    model = CASES[name].make()
    model.save_pretrained(folder / "files")
    model.save_pretrained(folder / "memory", save_original_format=False)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    for key, value in adapted.named_parameters():
        if "lora_" in key:  # of stacks PEFT leaves B at zero all the same
            value.data = 0.1 * torch.randn(value.shape)
    # Some classes have no one input embedding, which PEFT would ask for.
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return adapted, untouched


def make(name: str, folder: Path) -> Trial:
    """Write a model and an adapter, and merge with PEFT."""
    case = CASES[name]
    adapted, untouched = adapt(name, folder)
    inputs = case.inputs() if case.inputs else None
    expected = outputs(adapted, inputs) if inputs else None
    merged = adapted.merge_and_unload()
    state = {key: value.detach() for key, value in merged.state_dict().items()}
    merged.save_pretrained(folder / "peft-files")
    merged.save_pretrained(folder / "peft-memory", save_original_format=False)
    return Trial(case, folder, adapted, inputs, expected, untouched, state)


def unlike(model: nn.Module, expected: State) -> list[str]:
    """The floating parameters that are not those expected, but for one more rounding."""
    state = model.state_dict()
    return [
        name
        for name, value in expected.items()
        if value.is_floating_point()
        and value.numel()
        and not torch.allclose(state[name].float(), value.float(), rtol=1e-5, atol=2e-6)
    ]


@pytest.mark.parametrize("name", all_with(SAMPLE))
def test_a_merge_is_peft_s_in_both_layouts(name: str, tmp_path: Path) -> None:
    """Experts, split and renamed weights: the file loads as the function that was trained."""
    if name in BEYOND_PEFT:
        # PEFT's refusals, not ours: when it takes these the test fails, and they leave the list.
        with pytest.raises((ValueError, NotImplementedError), match=BEYOND_PEFT[name]):
            adapt(name, tmp_path)
        return
    if name in REFUSED:
        adapt(name, tmp_path)
        with pytest.raises(MatchError, match=REFUSED[name]):
            loratool.merge(tmp_path / "files", tmp_path / "adapter", tmp_path / "out")
        return
    trial = make(name, tmp_path)
    for layout in ("files", "memory"):
        out = tmp_path / f"out-{layout}"
        loratool.merge(trial.base(layout), trial.adapter, out, dtype="float32")
        loaded = trial.load(out)
        same = trial.expected is not None and name not in PAST_THE_LAYER
        if same:
            got = outputs(loaded, trial.inputs or {})
            assert got is not None
            assert close(got, trial.expected, 1e-4)
        wrong = unlike(loaded, trial.merged)
        # Where the head is the embedding's matrix, PEFT's merge is not its own forward pass.
        assert not [n for n in wrong if not trial_tied(trial, n)]
        assert unlike(loaded, trial.untouched)
        shutil.rmtree(out)
    for merged in ("peft-files", "peft-memory"):
        for layout in ("files", "memory"):
            if name.startswith("Inkling2Loop") and not merged.endswith(layout):
                continue  # queries of several layers are one tensor there, which no rule says
            report = loratool.verify(tmp_path / merged, trial.base(layout), trial.adapter)
            assert report.verdict == "yes", report.summary
    report = loratool.verify(trial.base("files"), trial.base("memory"), trial.adapter)
    assert report.verdict == "no"


def trial_tied(trial: Trial, name: str) -> bool:
    value = trial.untouched[name]
    return any(
        other is not value and other.shape == value.shape and torch.equal(other, value)
        for other in trial.untouched.values()
    )


@pytest.mark.parametrize("name", FEW)
def test_undo_gives_the_base_back(name: str, tmp_path: Path) -> None:
    """Bit for bit with an undo file, and within rounding by subtraction."""
    trial = make(name, tmp_path)
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(trial.base("files"), trial.adapter, out, dtype="base", reversible=True)
    loratool.unmerge(out, trial.adapter, back)
    before, after = read(trial.base("files")), read(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if read(out).keys() != before.keys():
        return  # a head that was the embedding's matrix is no subtraction's to take away
    loratool.unmerge(out, trial.adapter, tmp_path / "less", subtract=True)
    less = read(tmp_path / "less")
    assert all(torch.allclose(before[k].float(), less[k].float(), atol=1e-5) for k in before)


@pytest.mark.parametrize("name", all_with(FEW))
def test_adapters_with_the_names_of_files(name: str, tmp_path: Path) -> None:
    """What was trained with transformers 4 has the names of files, experts one by one: the base
    may have either layout, and what loads is the same."""
    case = CASES[name]
    model = case.make()
    model.save_pretrained(tmp_path / "files")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    files = load_file(tmp_path / "files" / "model.safetensors")
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.endswith(("lm_head", "decoder", "proj_out"))
    }
    names = Names(read_json(tmp_path / "files" / "config.json"), files)
    pairs = {}
    torch.manual_seed(2)
    for key, value in files.items():
        segments = names.segments(key)
        if (
            value.ndim == 2
            and key.endswith(".weight")
            and all(s.memory in linear or s.expert is not None for s in segments)
            and not any(s.transposed for s in segments)
        ):
            path = key.removesuffix(".weight")
            pairs[path] = 0.1 * torch.randn(4, value.shape[1]), 0.1 * torch.randn(len(value), 4)
    if name in CONV1D_ALONE:
        assert not pairs
        return
    assert pairs
    write_old(tmp_path / "adapter", pairs)
    states = []
    for layout in ("files", "memory"):
        out = tmp_path / f"out-{layout}"
        loratool.merge(tmp_path / layout, tmp_path / "adapter", out, dtype="float32")
        if layout == "files":
            got = read(out)
            for path, (a, b) in pairs.items():
                wanted = files[f"{path}.weight"].float() + 1.5 * b @ a
                assert torch.allclose(got[f"{path}.weight"], wanted, atol=1e-6)
        states.append(getattr(transformers, case.model).from_pretrained(out).state_dict())
    assert not unlike(_Loaded(states[1]), states[0])


class _Loaded(nn.Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def state_dict(self) -> State:  # type: ignore[override]
        return self._state


def write_old(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    folder.mkdir()
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": value
        for path, pair in pairs.items()
        for side, value in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "peft_version": "0.15.2",
         "target_modules": sorted({path.rpartition(".")[2] for path in pairs})},
    )  # fmt: skip
