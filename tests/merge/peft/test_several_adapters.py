"""Several adapters at once, DoRA among them, equal PEFT with all of them active."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layer_cases import INPUTS, SEVERAL, Case, linear, write_adapters
from helpers.models import DTYPES, Holder, State, close, float64_oracle, read, ulps
from peft import PeftModel
from torch import nn

import loratool


def plain_adapter(folder: Path) -> State:
    return {k.removeprefix("base_model.model."): v for k, v in read(folder).items()}


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 2.0], [0.0, 0.5, -0.5]])
def test_weighted_sum_of_adapters_is_rounded_once(
    weights: list[float], base_dtype: str, tmp_path: Path
) -> None:
    """Several adapters of unlike rank and alpha add up with their weights, of either sign."""
    case = Case(lambda: Holder(l=nn.Linear(64, 96)).to(DTYPES[base_dtype]))
    settings = [(4, 6), (1, 2.5), (9, 3)]
    adapters = write_adapters(
        tmp_path, case, *({"r": rank, "lora_alpha": alpha} for rank, alpha in settings)
    )
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapters, out, weights=weights, dtype="float16")
    terms = []
    for weight, (rank, alpha), folder in zip(weights, settings, adapters, strict=True):
        file = plain_adapter(folder)
        terms.append((weight * alpha / rank, file["l.lora_B.weight"], file["l.lora_A.weight"]))
    expected = float64_oracle(read(tmp_path / "base")["l.weight"], terms, "float16")
    steps = ulps(read(out)["l.weight"], expected)
    # float32 sums may fall on the other side of a tie, in which no one element is special.
    assert int(steps.max()) <= 1
    assert int((steps > 0).sum()) <= max(1, steps.numel() // 1000)


def test_weights_scale_trained_biases_too(tmp_path: Path) -> None:
    """The bias that lora_bias trains is added with the adapter's scale and weight."""
    adapters = write_adapters(tmp_path, linear(8, 6, lora_bias=True), {}, {"use_rslora": True})
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapters, out, weights=[0.5, -2.0], dtype="float32")
    one, other = (plain_adapter(folder)["l.lora_B.bias"] for folder in adapters)
    expected = read(tmp_path / "base")["l.bias"] + 0.5 * 6 / 4 * one - 2.0 * 6 / 2 * other
    assert close(read(out)["l.bias"], expected, 1e-6)


@pytest.mark.parametrize("weights", [None, [0.6, -1.4, 0.3]], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_several_adapters_with_dora_equal_pefts_forward_pass(
    name: str, kind: str, weights: list[float] | None, tmp_path: Path
) -> None:
    """DoRA beside other adapters gives the function of PEFT's forward pass with all of them."""
    case, x = INPUTS[kind]
    adapters = write_adapters(tmp_path, case, *SEVERAL[name])
    weights = weights and weights[: len(adapters)]
    loratool.merge(tmp_path / "base", adapters, tmp_path / "out", weights=weights, dtype="float32")
    with torch.no_grad():
        expected = all_active(case, tmp_path / "base", adapters, weights)(x)
        found = from_state(case, read(tmp_path / "out"))(x)
        base = from_state(case, read(tmp_path / "base"))(x)
    assert close(found, expected, 1e-5)
    assert not close(base, expected, 1e-2)


def from_state(case: Case, state: State) -> nn.Module:
    model = case.make()
    model.load_state_dict(state)
    return model.eval()


def all_active(
    case: Case, base: Path, adapters: list[Path], weights: list[float] | None
) -> nn.Module:
    """PEFT's model with all adapters active at once, each scaled with its weight."""
    model = PeftModel.from_pretrained(from_state(case, read(base)), adapters[0], "0")
    for i, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, str(i))
    names = [str(i) for i in range(len(adapters))]
    model.base_model.set_adapter(names)
    for name, weight in zip(names, weights or [], strict=False):
        model.get_submodule(f"base_model.model.{case.targets[0]}").set_scale(name, weight)
    return model.eval()
