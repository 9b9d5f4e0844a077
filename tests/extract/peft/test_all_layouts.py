"""Fine-tunes of tiny models of every class: extract -> PEFT -> the same model.

Every linear layer and every expert changes by a matrix of the rank that is asked for, so that the
adapter is exact. The base has the layout of the Hub's files, the fine-tune that or memory's. A
sample runs always, all classes with `-m layouts`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import State, close
from helpers.tiny.build import Inputs
from helpers.tiny.cases import CASES
from peft import PeftModel
from torch import nn

import loratool
from loratool.adapters.dialects.peft.targets import REWRITTEN_TYPES

#: Stacks and per-expert files, swapped ones, routers, dense layers and shared experts that PEFT
#: would take for experts, split and fused weights, rotary orders, prefixes, tied heads, Mamba.
SAMPLE = [
    "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GraniteMoeForCausalLM", "JetMoeForCausalLM",
    "AriaTextForCausalLM", "NemotronHForCausalLM", "LongcatFlashForCausalLM",
    "Qwen3VLMoeForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration", "NomicBertForMaskedLM", "JinaEmbeddingsV3Model",
    "RoFormerForMaskedLM", "OlmoHybridForCausalLM",
]  # fmt: skip

#: What PEFT cannot load at all, with words of its error.
BEYOND_PEFT = {
    "IBertForMaskedLM": "lm_head.decoder.bias",
    "DeformableDetrForObjectDetection": "get_input_embeddings",
    "RTDetrV2ForObjectDetection": "get_input_embeddings",
    "PPDocLayoutV4ForObjectDetection": "get_input_embeddings",
    "DFineForObjectDetection": "get_input_embeddings",
}

#: What extract refuses, for a fine-tune in which layouts, with words of why: queries that have
#: other names in memory, a matrix in three places, a classifier alone.
REFUSED = {
    "Inkling2LoopForCausalLM": (("memory",), "in one of the two models only"),
    "Inkling2LoopForConditionalGeneration": (("memory",), "in one of the two models only"),
    "Pop2PianoForConditionalGeneration": (("files", "memory"), "shares one matrix"),
    "ResNetForImageClassification": (("files", "memory"), "No weight that could become factors"),
}

#: It asks for a file of voices.
NOT_LOADED = {"Qwen2_5OmniForConditionalGeneration"}

RANK = 2


def all_classes() -> list[object]:
    return [
        pytest.param(name, marks=() if name in SAMPLE else (pytest.mark.layouts,))
        for name in CASES
        if name not in NOT_LOADED
    ]


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of linear layers and stacks of experts, without those that embeddings share."""
    tied = {
        p.data_ptr()
        for module in model.modules() if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }  # fmt: skip
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        for name, value in module.named_parameters(recurse=False):
            stack = value.ndim == 3 and ("expert" in path or "Expert" in type(module).__name__)
            if value.data_ptr() not in tied and (stack or (linear and name == "weight")):
                tied.add(value.data_ptr())
                yield f"{path}.{name}", value


def tuned_of(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for _, value in weights(found):
        *lead, rows, columns = value.shape
        b = torch.randn(*lead, rows, RANK, generator=generator)
        a = torch.randn(*lead, RANK, columns, generator=generator)
        value.data += 0.01 * b @ a
    return found


def outputs(model: nn.Module, inputs: Inputs | None) -> torch.Tensor | None:
    """The logits, or what a model without logits gives; None where the tiny inputs do not do."""
    try:
        with torch.no_grad():
            found = model(**(inputs or {}))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None
    return next(
        (found[k] for k in ("logits", "last_hidden_state", "logits_per_image") if k in found), None
    )


def unlike(state: State, expected: State) -> list[str]:
    return [
        name
        for name, value in expected.items()
        if value.is_floating_point()
        and value.numel()
        and not torch.allclose(state[name], value, rtol=1e-5, atol=1e-4)
    ]


@pytest.mark.parametrize("name", all_classes())
@pytest.mark.parametrize("layout", ["files", "memory"])
@pytest.mark.filterwarnings("ignore")
def test_peft_makes_the_fine_tune_of_base_and_adapter(
    name: str, layout: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base, tuned, adapter = tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter"
    model = case.make()
    goal = tuned_of(model)
    model.save_pretrained(base)
    goal.save_pretrained(tuned, save_original_format=layout == "files")  # type: ignore[operator]
    # What is saved may be tied, and loads so.
    goal = getattr(transformers, case.model).from_pretrained(tuned).eval()
    layouts, why = REFUSED.get(name, ((), ""))
    if layout in layouts:
        with pytest.raises(loratool.LoraToolError, match=why):
            loratool.extract(base, tuned, adapter, rank=RANK, dtype="float32", embeddings=True)
        return
    report = loratool.extract(base, tuned, adapter, rank=RANK, dtype="float32", embeddings=True)
    codes = {notice.code for notice in report.warnings}
    assert report.held is not None
    assert report.held > 0.9999
    if layout == "files":
        loratool.merge(base, adapter, tmp_path / "merged", dtype="float32")
        merged = getattr(transformers, case.model).from_pretrained(tmp_path / "merged")
        assert not unlike(merged.state_dict(), goal.state_dict())
    model = getattr(transformers, case.model).from_pretrained(base).eval()
    before = outputs(model, case.inputs() if case.inputs else None)
    if name in BEYOND_PEFT:
        # PEFT's refusals, not ours: when it loads these the test fails, and they leave the list.
        with pytest.raises((NotImplementedError, KeyError), match=BEYOND_PEFT[name]):
            PeftModel.from_pretrained(model, adapter)
        return
    loaded = PeftModel.from_pretrained(model, adapter).eval()
    if "names-in-peft" in codes:
        return
    inputs = case.inputs() if case.inputs else None
    expected = outputs(goal, inputs)
    again = outputs(goal, inputs)
    repeats = expected is not None and again is not None and torch.equal(expected, again)
    if expected is not None and repeats and "shared-in-peft" not in codes:
        got = outputs(loaded, inputs)
        assert got is not None
        assert close(got, expected, 1e-4)
        assert before is not None
        assert not close(before, expected, 1e-4)
    assert not unlike(loaded.merge_and_unload().state_dict(), goal.state_dict())


def test_types_that_peft_rewrites() -> None:
    """Where PEFT takes layers for parts of experts by their names, extract names their weights."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    rewritten = {
        kind for kind, of in _MODEL_TO_CONVERSION_PATTERN.items()
        if of in ("qwen2_moe", "mixtral") and kind.islower()
    }  # fmt: skip
    assert rewritten | {"mixtral"} == REWRITTEN_TYPES
