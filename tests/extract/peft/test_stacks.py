"""Stacks of experts of full rank: ranks by every policy, and what is left out or unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.extracting import config_of
from helpers.models import State
from helpers.tiny.cases import CASES
from peft import PeftModel

import loratool

CASE = CASES["Qwen3MoeForCausalLM"]
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def written(folder: Path, *unchanged: int) -> tuple[State, State]:
    """A base with a tensor per expert and a fine-tune with stacks, everything moved but these
    experts of `STACK`."""
    model = CASE.make()
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    for name, value in tuned.named_parameters():
        move = 0.01 * torch.randn(value.shape, generator=generator)
        if name == STACK:
            move[list(unchanged)] = 0
        value.data += move
    model.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned", save_original_format=False)
    return model.state_dict(), tuned.state_dict()


def merged_by_peft(folder: Path) -> State:
    base = getattr(transformers, CASE.model).from_pretrained(folder / "base").eval()
    state: State = (
        PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    )
    return state


def size(one: State, other: State) -> float:
    return float(sum((one[k].double() - other[k].double()).square().sum() for k in one)) ** 0.5


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4}, {"energy": 0.7}, {"energy": 0.7, "patterns": True}, {"budget": 60_000},
        {"budget": 60_000, "patterns": True}, {"rank": 3, "exclude": ["*gate_up_proj"]},
        {"rank": 4, "save": ["*experts*"]},
    ],
    ids=str,
)  # fmt: skip
def test_the_error_is_that_of_what_peft_has(options: dict[str, Any], tmp_path: Path) -> None:
    """By every policy: one rank for a stack, the stated error, a file within the budget."""
    before, after = written(tmp_path)
    report = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter",
        dtype="float32", verify=True, **options,
    )  # fmt: skip
    off = size(merged_by_peft(tmp_path), after) / size(before, after)
    assert off == pytest.approx(report.error, rel=1e-4)
    assert report.verified == pytest.approx(report.error, rel=1e-4)
    assert report.bytes_written <= options.get("budget", report.bytes_written)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
def test_an_expert_that_did_not_change_has_zeros(tmp_path: Path) -> None:
    before, _ = written(tmp_path, 1)
    loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    moved = merged_by_peft(tmp_path)[STACK] != before[STACK]
    assert [bool(expert.any()) for expert in moved] == [True, False, True, True]


def test_a_stack_that_did_not_change_is_no_target(tmp_path: Path) -> None:
    """Of one of two parameters of a module the key has no base_layer, and the config says which."""
    before, after = written(tmp_path, 0, 1, 2, 3)
    loratool.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=24, dtype="float32",
        exclude=["model.layers.1.*"],
    )  # fmt: skip
    parameters = config_of(tmp_path / "adapter")["target_parameters"]
    assert not any("gate_up_proj" in entry for entry in parameters)
    merged = merged_by_peft(tmp_path)
    assert torch.equal(merged[STACK], before[STACK])
    down = STACK.replace("gate_up_proj", "down_proj")
    assert torch.allclose(merged[down], after[down], atol=1e-5)
