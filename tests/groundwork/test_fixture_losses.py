"""The trained fixtures: merging keeps what training achieved."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import held_out_loss
from helpers.places import FIXTURES
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratool


@cache
def base_loss(text: Path = FIXTURES / "heldout.txt") -> float:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    return held_out_loss(model, text)


@cache
def adapted_loss() -> float:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    return held_out_loss(PeftModel.from_pretrained(model, FIXTURES / "adapter"))


def documented(name: str) -> float:
    row = re.search(rf"\| {re.escape(name)} \| ([\d.]+) \|", (FIXTURES / "README.md").read_text())
    assert row is not None
    return float(row[1])


@pytest.mark.long
def test_losses_are_those_the_readme_states() -> None:
    """The fixtures are the models that fixtures/README.md describes."""
    assert base_loss() == pytest.approx(documented("`base/`"), abs=2e-4)
    assert adapted_loss() == pytest.approx(documented("`base/` with `adapter/`"), abs=2e-4)
    assert documented("`tuned/`") < documented("`base/` with `adapter/`") < documented("`base/`")


@pytest.mark.long
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
    assert base_loss() - loss > 0.2


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


TEXTS = {
    "code": FIXTURES / "heldout.txt",
    "html": FIXTURES / "tasks" / "html.txt",
    "tables": FIXTURES / "tasks" / "tables.txt",
}


def losses_with(adapter: Path) -> list[float]:
    """Losses on the three tasks of the base with this adapter, as PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter)
    return [held_out_loss(adapted, text) for text in TEXTS.values()]


def row_of(page: Path, name: str) -> list[float]:
    """The losses in the line of a table that starts with this name."""
    row = re.search(rf"^\| {re.escape(name)} \|(.+)\|$", page.read_text(), re.MULTILINE)
    assert row is not None
    return [float(x) for x in re.findall(r"\d+\.\d+", row[1])][:3]


@pytest.mark.long
@pytest.mark.parametrize("task", ["html", "tables"])
def test_task_adapters_have_the_losses_their_readme_states(task: str) -> None:
    """The adapters of fixtures/tasks are the ones that its README describes."""
    stated = row_of(FIXTURES / "tasks" / "README.md", task)
    assert losses_with(FIXTURES / "tasks" / task) == pytest.approx(stated, abs=2e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("`sum --rank 8`, weights 0.5", {"rank": 8, "weights": [0.5] * 3}),
        ("`ties_core`, weights 0.5", {"method": "ties_core", "density": 0.5, "weights": [0.5] * 3}),
    ],
)
def test_combined_tasks_have_the_losses_that_the_docs_state(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Three trained adapters, combined and loaded by PEFT, do as docs/combining.md says."""
    adapters = [FIXTURES / "adapter", FIXTURES / "tasks" / "html", FIXTURES / "tasks" / "tables"]
    loratool.combine(adapters, tmp_path / "out", **options)
    found = losses_with(tmp_path / "out")
    assert found == pytest.approx(row_of(FIXTURES.parent / "docs" / "combining.md", name), abs=2e-3)
    base = [base_loss(text) for text in TEXTS.values()]
    assert sum(found) < sum(base) - 0.5


RANKS = {f"`--rank {rank}`": {"rank": rank} for rank in (1, 2, 4, 8, 16, 32, 64)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *RANKS.items(),
        ("`--energy 0.9`", {"energy": 0.9}),
        ("`--energy 0.9 --patterns`", {"energy": 0.9, "patterns": True}),
        ("`--budget 167kB`", {"budget": "167kB"}),
        ("`--budget 167kB --patterns`", {"budget": "167kB", "patterns": True}),
        ("`--rank 16 --save norms`", {"rank": 16, "save": ["norms"]}),
    ],
)
def test_extracted_adapters_hold_what_the_docs_state(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Share, error and, for some, the loss of an adapter of the full fine-tune, loaded by PEFT."""
    report = loratool.extract(FIXTURES / "base", FIXTURES / "tuned", tmp_path / "out", **options)
    held, error, loss = row_of(FIXTURES.parent / "docs" / "extracting.md", name)
    assert report.held == pytest.approx(held / 100, abs=1e-3)
    assert report.error == pytest.approx(error / 100, abs=1e-3)
    if name in ("`--rank 4`", "`--rank 16`", "`--budget 167kB --patterns`"):
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, tmp_path / "out")
        assert held_out_loss(adapted) == pytest.approx(loss, abs=2e-3)
