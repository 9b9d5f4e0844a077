"""The trained fixtures: merging keeps what training achieved."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratool


def held_out_loss(model: torch.nn.Module) -> float:
    """Mean nats per byte on heldout.txt, in windows of 256 predicted bytes."""
    tokens = torch.tensor(list((FIXTURES / "heldout.txt").read_bytes()))
    count = (len(tokens) - 1) // 256
    inputs = tokens[: count * 256].view(count, 256)
    targets = tokens[1 : count * 256 + 1].view(count, 256)
    total = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(32), targets.split(32), strict=True):
            logits = model(x).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y.flatten(), reduction="sum"
            ).item()
    return total / (count * 256)


@cache
def base_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)


@cache
def adapted_loss() -> float:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    return held_out_loss(PeftModel.from_pretrained(model, FIXTURES / "adapter"))


def documented(name: str) -> float:
    row = re.search(rf"\| {re.escape(name)} \| ([\d.]+) \|", (FIXTURES / "README.md").read_text())
    assert row is not None
    return float(row[1])


def test_losses_are_those_the_readme_states() -> None:
    """The fixtures are the models that fixtures/README.md describes."""
    assert held_out_loss(base_model()) == pytest.approx(documented("`base/`"), abs=2e-4)
    assert adapted_loss() == pytest.approx(documented("`base/` with `adapter/`"), abs=2e-4)
    assert documented("`tuned/`") < documented("`base/` with `adapter/`") < documented("`base/`")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-4), ("bfloat16", 2e-3)]
)
def test_merged_model_has_the_loss_of_base_and_adapter(
    dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """The merged model predicts held-out text as base + adapter does, up to its own rounding."""
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loss = held_out_loss(merged)
    assert loss == pytest.approx(adapted_loss(), abs=tolerance)
    assert held_out_loss(base_model()) - loss > 0.2


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    """The output's tokenizer is the base's, and config.json names the output's dtype."""
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out")
    text = "def merge(base, adapter):\n"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert ids == list(text.encode())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_weights_scale_the_adapter(tmp_path: Path) -> None:
    """Weight 1 then −1 in one pass gives the base back; half the weight gives half the change."""
    base_path, adapter = FIXTURES / "base", FIXTURES / "adapter"
    for name, weights in {"none": [1.0, -1.0], "half": [0.5], "full": [1.0]}.items():
        adapters = [adapter] * len(weights)
        loratool.merge(base_path, adapters, tmp_path / name, weights=weights, dtype="float32")

    def weight(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.get_submodule("model.layers.1.mlp.up_proj").weight

    base = weight(base_path)
    full = weight(tmp_path / "full") - base
    assert full.abs().max() > 0.01
    assert (weight(tmp_path / "none") - base).abs().max() < 1e-6
    assert torch.allclose(weight(tmp_path / "half") - base, full / 2, atol=1e-6)
