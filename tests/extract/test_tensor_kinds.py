"""Every tensor that differs is held as factors, saved whole, or listed as left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.extracting import (
    EVERYTHING,
    Q0,
    Pair,
    assert_accounted,
    assert_selected,
    distance,
    model,
    moved,
    odd_model,
    random_for,
    saved,
)


@pytest.mark.parametrize(
    "options",
    [EVERYTHING, {}, {"skip": ["norms", "others"]}, {"include": ["layers.*"]}],
    ids=str,
)
@pytest.mark.parametrize("name", [*odd_model(), ""])
def test_every_kind_of_tensor_is_accounted_for(tmp_path: Path, name: str, options: Any) -> None:
    """A change of any one tensor beside q_proj, or of all, is held, saved or listed as left out."""
    state = odd_model()
    tuned = moved(state, f"{Q0}.weight", *([name] if name else list(state)))
    if name in ("model.position_ids", ""):
        tuned["model.position_ids"] = state["model.position_ids"] + 1
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=True, **options)
    assert_accounted(report, state, tuned)
    if options.get("save"):
        assert not report.left
        assert report.held == pytest.approx(1, abs=1e-8)
        assert distance(state, tuned, pair.out) < 2e-5
        for key, value in saved(pair.out).items():
            assert torch.equal(value, tuned[key])
    if name:
        assert report.unchanged >= len(state) - 4
    assert_selected(pair.out, {n: t for n, t in state.items() if n.rpartition(".")[0] != "model"})


def test_each_kind_goes_where_peft_can_load_it(tmp_path: Path) -> None:
    """Linear layers, convolutions and token embeddings become factors; norms, biases, bare
    parameters, other embeddings, routers, depthwise convolutions, buffers and heads are whole."""
    state = odd_model()
    tuned = moved(state) | {"model.position_ids": state["model.position_ids"] + 1}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=3, **EVERYTHING)
    kinds = {m.path: m.kind for m in report.modules if m.kind != "linear"}
    assert kinds == {
        "model.embed_tokens": "embedding", "model.vision.conv": "conv", "model.audio.conv1": "conv",
        "model.layers.0.mlp.experts.gate_up_proj": "experts",
    }  # fmt: skip
    whole = {t.name for t in report.saved}
    assert whole >= {
        "model.scale", "model.temperature",
        "model.layers.0.mlp.gate.weight", "model.vision.depthwise.weight", "model.position_ids",
        "model.embed_positions.weight", "classifier.dense.weight", "score.weight",
        "model.vision.conv.bias",
    }  # fmt: skip
    assert not any(f"{m.path}.weight" in whole for m in report.modules)


@pytest.mark.parametrize(
    ("kind", "stack", "parameter"),
    [
        ("jetmoe", "mlp.input_linear.weight", "mlp.input_linear.weight"),
        ("granitemoe", "block_sparse_moe.input_linear.weight",
         "block_sparse_moe.experts.gate_up_proj"),
    ],
)  # fmt: skip
def test_experts_that_are_one_weight_are_no_convolution(
    tmp_path: Path, kind: str, stack: str, parameter: str
) -> None:
    """JetMoE's and GraniteMoE's files keep all experts in `input_linear.weight` [experts, out, in].
    Each expert gets factors, in the parameter that memory has."""
    name = f"model.layers.0.{stack}"
    state = model() | {name: random_for("e", 3, 8, 6).float()}
    pair = Pair(tmp_path, state, moved(state, name, f"{Q0}.weight"), model_type=kind)
    report = pair.extract(rank=2)
    assert {m.path: m.kind for m in report.modules} == {
        Q0: "linear", f"model.layers.0.{parameter}": "experts",
    }  # fmt: skip
    assert not report.saved


def test_norms_are_saved_with_both_tensors(tmp_path: Path) -> None:
    """PEFT saves whole modules: a norm whose weight alone changed is saved with its bias."""
    state = odd_model()
    pair = Pair(tmp_path, state, moved(state, f"{Q0}.weight", "post_norm.weight"))
    report = pair.extract(rank=2, save=["norms"])
    at = "model.layers.0.post_norm."
    assert {t.name for t in report.saved} == {at + "weight", at + "bias"}
    assert_accounted(report, state, pair.after)
