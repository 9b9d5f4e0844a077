"""Every part of an adapter lands, or the merge fails before it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.cli import run_cli
from helpers.layer_cases import edit_adapter, edit_base, linear, refuse, two_linear, write_adapters
from helpers.places import FIXTURES

import loratool
from loratool.errors import LoraToolError, MatchError


@pytest.fixture
def astray(tmp_path: Path) -> Path:
    """One module that fits the fixtures' base, and seven whose names do not."""
    tensors = pair(Q, 128, 128)
    for layer in range(7):
        tensors |= pair(f"model.layers.{layer}.self_attn.q_project", 128, 128)
    return write_adapter(tmp_path / "adapter", tensors, {"base_model_name_or_path": "some/model"})


def test_what_the_base_lacks_is_one_line(astray: Path, tmp_path: Path) -> None:
    """The error counts what is lost, names three with what the first may have meant, and the
    base."""
    with pytest.raises(MatchError) as error:
        loratool.merge(FIXTURES / "base", astray, tmp_path / "out")
    message = error.value.message
    assert message.startswith("7 parts of the adapter do not fit the base")
    assert message.count("the base has no") == 1
    assert "(nearest: model.layers.0.self_attn.q_proj.weight)" in message
    assert "and 4 more" in message
    assert "some/model" in error.value.hint
    assert "--allow-unmatched" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_allow_unmatched_merges_the_rest_and_records_it(astray: Path, tmp_path: Path) -> None:
    """What fits is merged; what does not is a warning in the report and in loratool.json."""
    report = loratool.merge(FIXTURES / "base", astray, tmp_path / "out", allow_unmatched=True)
    assert report.modules == 1
    assert [w.code for w in report.warnings] == ["unmatched"]
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["result"]["warnings"][0]["code"] == "unmatched"
    assert "q_project" in record["result"]["warnings"][0]["message"]


def test_allow_unmatched_also_covers_tensors_without_meaning(tmp_path: Path) -> None:
    """A tensor nobody knows stops the merge, unless it is allowed to stay behind."""
    tensors = {**pair(Q, 128, 128), "base_model.model.x.lora_secret": np.ones(3, np.float32)}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    arguments = ["merge", str(FIXTURES / "base"), str(adapter), "-o", str(tmp_path / "out")]
    assert "unknown-tensors" in run_cli(*arguments).stderr
    allowed = run_cli(*arguments, "--allow-unmatched")
    assert allowed.exit_code == 0
    assert "unknown-tensors" in allowed.stderr


def test_wrong_shapes_say_expected_and_found(tmp_path: Path) -> None:
    """A module of another width is refused with both shapes; nothing is transposed to fit."""
    adapter = write_adapter(
        tmp_path / "adapter", pair("model.layers.0.self_attn.k_proj", 128, 64), {}
    )
    with pytest.raises(MatchError, match=r"B·A gives \[128, 64\], .* is \[64, 128\]"):
        loratool.merge(FIXTURES / "base", adapter, tmp_path / "out")


def test_hint_for_the_wrong_base_does_not_praise_a_lone_head(tmp_path: Path) -> None:
    """If no module fits, --allow-unmatched is not suggested for the sake of a saved head."""
    tensors = {**pair("other.q", 3, 3), "base_model.model.score.weight": np.ones((2, 5), "f4")}
    adapter = write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["score"]})
    with pytest.raises(LoraToolError) as error:
        loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out")
    assert "--allow-unmatched" not in error.value.hint


def test_trained_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    """lora_bias needs a bias to add to; one is neither invented nor dropped."""
    trained = linear(12, 20, lora_bias=True).train(tmp_path)
    edit_base(trained, lambda state: {"l.weight": state["l.weight"]})
    refuse(trained, MatchError, "bias")


@pytest.mark.parametrize("shape", [(20, 13), (21, 12), (12, 20), (240,), (20, 12, 1)])
def test_base_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A base whose matrix does not have the shape of B·A is refused, transposed too."""
    trained = linear(12, 20).train(tmp_path)
    edit_base(trained, lambda state: {**state, "l.weight": torch.zeros(shape)})
    refuse(trained, MatchError, "do not fit")


def test_module_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    """An adapted module without a place in the base stops the merge, however many others fit."""
    trained = two_linear().train(tmp_path)
    other = {"base_model.model.l2.lora_A.weight": torch.zeros(4, 12),
             "base_model.model.l2.lora_B.weight": torch.zeros(20, 4)}  # fmt: skip
    edit_adapter(trained, lambda state: {**state, **other})
    refuse(trained, MatchError, "the base has no l2.weight")


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["z"]}], ids=["biases", "modules"]
)
def test_two_adapters_that_replace_the_same_tensor_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Of two replacements for one tensor neither is chosen in silence."""
    adapters = write_adapters(tmp_path, two_linear(**options), {}, {})
    with pytest.raises(MatchError, match="two adapters replace"):
        loratool.merge(tmp_path / "base", adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
