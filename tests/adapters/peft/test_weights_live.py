"""Types of PEFT's whose change depends on the weight, in the forms that no fixture has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import Holder, Trained, edit_config, train
from peft import (
    DeftConfig,
    FrodConfig,
    GloraConfig,
    HiraConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    TinyLoraConfig,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.adapters.reading import read_adapter
from loratool.errors import LoraToolError


def linear(bias: bool = False) -> nn.Module:
    return nn.Linear(12, 20, bias=bias)


def turned() -> nn.Module:
    return Conv1D(20, 12)


FORMS: dict[str, tuple[Any, Any]] = {
    "hira-conv": (lambda: nn.Conv2d(4, 6, 3), HiraConfig(r=2)),
    "hira-turned": (turned, HiraConfig(r=2, fan_in_fan_out=True)),
    "hira-pattern": (linear, HiraConfig(r=2, rank_pattern={"l": 3})),
    "glora-vectors": (
        lambda: linear(True),
        GloraConfig(r=2, config_A_B="vector", config_C="none", config_D_E="vector"),
    ),
    "glora-constants": (
        lambda: linear(True),
        GloraConfig(r=2, config_A_B="constant", config_C="none", config_D_E="constant"),
    ),
    "glora-bias-alone": (
        lambda: linear(True),
        GloraConfig(r=2, config_A_B="none", config_C="none", config_D_E="constant"),
    ),
    "deft-turned": (turned, DeftConfig(r=3, alpha=5, fan_in_fan_out=True)),
    "deft-qr-turned": (
        turned, DeftConfig(r=3, decomposition_method="qr", fan_in_fan_out=True),
    ),
    "deft-wide": (lambda: nn.Linear(12, 2, bias=False), DeftConfig(r=3)),
    "para-turned": (turned, DeftConfig(r=3, para=True, fan_in_fan_out=True)),
    "frod-turned": (turned, FrodConfig(fan_in_fan_out=True, sparse_rate=0.2, progressbar=False)),
    "frod-wide": (
        lambda: nn.Linear(20, 12, bias=False), FrodConfig(sparse_rate=0.2, progressbar=False),
    ),
    "peanut-gelu": (linear, PeanutConfig(r=3, depth=2, act_fn="gelu", scaling=0.7)),
    "peanut-tanh": (linear, PeanutConfig(r=3, act_fn="gelu_pytorch_tanh")),
    "psoft-both": (linear, PsoftConfig(r=4, psoft_alpha=3, ab_svd_init="pissa_init")),
    "psoft-free": (linear, PsoftConfig(r=4, psoft_orth=False, psoft_mag_a=False)),
    "psoft-drawn": (linear, PsoftConfig(r=4, psoft_svd="lowrank", random_seed=3)),
    "psoft-series": (
        linear,
        PsoftConfig(
            r=4, use_cayley_neumann=True, num_cayley_neumann_terms=4, cayley_neumann_eps=0.2
        ),
    ),
    "osf-pattern": (linear, OSFConfig(effective_rank=0.5, rank_pattern={"l": 9})),
}  # fmt: skip


def trained(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Trained:
    make, config = FORMS[name]
    config = copy.deepcopy(config)
    config.target_modules = {"l"}
    config.init_weights = False
    torch.manual_seed(0)
    return train(folder, Holder(l=make()), config, dtype)


def share_of_change(found: torch.Tensor, right: torch.Tensor, before: torch.Tensor) -> float:
    """The error as a share of the change, but for float32's rounding of the result."""
    change = (right.double() - before.double()).norm()
    assert change > 0
    rounding = 2.0**-24 * right.norm()
    return float(((found.double() - right.double()).norm() - rounding).clamp_min(0) / change)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_merged_as_peft_does(name: str, tmp_path: Path) -> None:
    """Weights stored either way, biases, and every way in which the type computes."""
    case = trained(name, tmp_path)
    before = case.base_state()
    case.model.double()
    right, found = case.peft_merge(), case.merge()
    changed = [name for name in before if not torch.equal(right[name].float(), before[name])]
    assert changed
    for tensor in changed:
        assert share_of_change(found[tensor], right[tensor], before[tensor]) < 1e-6
    assert loratool.verify(tmp_path / "merged", case.base, case.adapter).verdict == "yes"


@pytest.mark.parametrize("name", ["osf-pattern", "frod-wide"])
def test_parts_of_a_narrow_base_are_rounded_as_peft_rounds_them(name: str, tmp_path: Path) -> None:
    """PEFT keeps the factors that it makes of a bfloat16 weight in bfloat16."""
    case = trained(name, tmp_path, torch.bfloat16)
    before = case.base_state()
    case.model.double()
    right, found = case.peft_merge(), case.merge(dtype="float32")
    error = share_of_change(found["l.weight"], right["l.weight"], before["l.weight"])
    assert error < 1e-6


def test_glora_that_multiplies_the_weight_into_a_bias_is_refused(tmp_path: Path) -> None:
    make, config = (lambda: linear(True)), GloraConfig(target_modules=["l"], r=2)
    case = train(tmp_path, Holder(l=make()), config)
    assert "glora_C" in reasons(case.adapter)["peft-options"]


def reasons(adapter: Path) -> dict[str, str]:
    return {n.code: n.message for n in read_adapter(adapter).notices if n.refused}


def test_signs_that_a_gpu_may_find_otherwise_are_warned_of(tmp_path: Path) -> None:
    case = trained("psoft-both", tmp_path)
    assert "signs-of-base" in {n.code for n in read_adapter(case.adapter).notices}


def test_equal_singular_values_leave_it_to_chance_what_was_trained(tmp_path: Path) -> None:
    """Of a weight whose singular values are all equal nobody knows which are the smaller ones."""
    layer = nn.Linear(12, 12, bias=False)
    layer.weight.data = torch.eye(12)
    config = OSFConfig(target_modules=["l"], effective_rank=5, init_weights=False)
    case = train(tmp_path, Holder(l=layer), config)
    with pytest.raises(LoraToolError, match="chance"):
        case.merge()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["osf-pattern", "psoft-both", "frod-wide"])
def test_a_broken_base_is_an_error(name: str, tmp_path: Path) -> None:
    """A weight with NaN cannot be taken apart."""
    case = trained(name, tmp_path)
    path = case.base / "model.safetensors"
    state = load_file(path)
    state["l.weight"][1, 1] = float("nan")
    save_file(state, path)
    with pytest.raises(LoraToolError, match="NaN"):
        case.merge()


def test_places_outside_of_a_matrix_are_an_error(tmp_path: Path) -> None:
    case = trained("frod-wide", tmp_path)
    rewrite(case.adapter, "frod_s_indices.l", lambda t: t + 20)
    with pytest.raises(LoraToolError, match="frod_s_indices"):
        case.merge()


def rewrite(adapter: Path, end: str, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    (name,) = [name for name in state if name.endswith(end)]
    state[name] = change(state[name])
    save_file(state, path)


SHAPES = [
    ("hira-pattern", "hira_A", (3, 12), "pair-mismatch"),
    ("glora-vectors", "glora_A.X", (19, 1), "pair-mismatch"),
    ("deft-turned", "deft_P", (20, 2), "rank-mismatch"),
    ("deft-turned", "deft_R", (2, 12), "pair-mismatch"),
    ("peanut-gelu", "peanut_decoders.0.weight", (3, 4), "pair-mismatch"),
    ("psoft-both", "psoft_R.weight", (10,), "rank-mismatch"),
    ("psoft-both", "vector_a", (3,), "pair-mismatch"),
    ("osf-pattern", "S_low", (4,), "pair-mismatch"),
    ("frod-wide", "frod_lambda_l", (19,), "pair-mismatch"),
]


@pytest.mark.parametrize(("name", "slot", "shape", "code"), SHAPES)
def test_shapes_that_do_not_belong_together_are_refused(
    name: str, slot: str, shape: tuple[int, ...], code: str, tmp_path: Path
) -> None:
    case = trained(name, tmp_path)
    rewrite(case.adapter, slot, lambda t: torch.ones(shape))
    assert code in reasons(case.adapter)


UNKNOWN = [
    ("peanut-gelu", {"act_fn": "laplace"}, "act_fn"),
    ("peanut-gelu", {"depth": 1}, "depth"),
    ("frod-wide", {"save_projection": False}, "save_projection"),
    ("psoft-both", {"psoft_alpha": 0}, "psoft_alpha"),
    ("deft-turned", {"para": True}, "deft_R"),
]


@pytest.mark.parametrize(("name", "fields", "said"), UNKNOWN)
def test_what_a_config_makes_impossible_is_said(
    name: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    case = trained(name, tmp_path)
    edit_config(case.adapter, **fields)
    assert said in " ".join(reasons(case.adapter).values())


@pytest.mark.parametrize("tying", [0.0, 0.5, 1.0])
def test_each_module_has_its_own_vector(tying: float, tmp_path: Path) -> None:
    """Which of TinyLoRA's vectors a module has, its projection tells, whatever keys are called."""
    layers = {name: nn.Linear(6 + i, 9, bias=False) for i, name in enumerate("qzakb")}
    config = TinyLoraConfig(
        target_modules=list(layers), r=2, u=5, weight_tying=tying, init_weights="uniform",
        init_v_bound=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    case = train(tmp_path, Chain(layers), config)
    before = case.base_state()
    case.model.double()
    right, found = case.peft_merge(), case.merge()
    for tensor in before:
        assert share_of_change(found[tensor], right[tensor], before[tensor]) < 1e-6
    edit_config(case.adapter, projection_seed=7)
    if tying < 1:
        with pytest.raises(LoraToolError, match="projection_seed"):
            case.merge(tmp_path / "other")


class Chain(nn.Module):
    """Layers that are registered in the order that they are given in."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def test_tinylora_of_an_embedding(tmp_path: Path) -> None:
    config = TinyLoraConfig(target_modules=["l"], r=2, u=5, init_weights="uniform")
    case = train(tmp_path, Holder(l=nn.Embedding(30, 8)), config)
    before = case.base_state()
    case.model.double()
    right, found = case.peft_merge(), case.merge()
    assert share_of_change(found["l.weight"], right["l.weight"], before["l.weight"]) < 1e-5
    assert np.isfinite(found["l.weight"].numpy()).all()
