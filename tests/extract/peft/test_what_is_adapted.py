"""PEFT adapts what changed and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.architectures import GPT2, SIZES, Architecture, causal
from helpers.tuning import EXACT, MODELS, WARNINGS, computed, load_peft, tune
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper


def adapted(model: PeftModel, kind: type) -> set[str]:
    """The paths of all modules of a kind that PEFT made: layers with factors, or saved modules."""
    own = model.get_base_model()
    return {name for name, module in own.named_modules() if isinstance(module, kind)}


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
    "one module and the head": r"\.1\.mlp\.up_proj\.weight$|^lm_head\.",
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
