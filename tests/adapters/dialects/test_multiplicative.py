"""Multiplicative LoRA, W + s·B·A·W: told by the user, and known with the weight alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import codes, write_adapter
from helpers.files import load, same, write_base
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.adapters.told import Told
from loratool.errors import LoraToolError

State = dict[str, Tensor]
UP, OUT = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"
TOLD = Told(alpha=6.0, kind="multiplicative")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def plain() -> State:
    return {f"{UP}.weight": torch.randn(10, 6), f"{OUT}.weight": torch.randn(6, 6)}


@pytest.fixture
def base(plain: State, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", plain)


def factors(*names: str) -> State:
    rows = {UP: 10, OUT: 6}
    halves = {"A": lambda path: (2, rows[path]), "B": lambda path: (rows[path], 2)}
    return {
        f"{path}.{name.format(half)}": torch.randn(*shape(path)) * 0.3
        for name in names
        for path in rows
        for half, shape in halves.items()
    }


def expected(plain: State, state: State, name: str, prefix: str = "") -> State:
    made = {}
    for path in (UP, OUT):
        a, b = (state[f"{prefix}{path}.{name.format(half)}"] for half in "AB")
        weight = plain[f"{path}.weight"]
        made[f"{path}.weight"] = weight + 3 * b @ a @ weight
    return made


def near(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=1e-5) for name in one
    )


@pytest.mark.parametrize("name", ["lora_{}.weight", "lora_{}", "lora.{}"])
def test_it_is_merged_as_declared(name: str, plain: State, base: Path, tmp_path: Path) -> None:
    state = factors(name)
    save_file(state, tmp_path / "lora.safetensors")
    loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", dtype="float32",
                   told=TOLD, verify=True)  # fmt: skip
    assert near(load(tmp_path / "out"), expected(plain, state, name))


def test_a_directory_of_peft_may_be_declared_so(plain: State, base: Path, tmp_path: Path) -> None:
    prefix = "base_model.model."
    state = {prefix + key: value for key, value in factors("lora_{}.weight").items()}
    tensors = {key: value.numpy() for key, value in state.items()}
    folder = write_adapter(tmp_path / "lora", tensors, {"r": 2, "lora_alpha": 6})
    loratool.merge(base, folder, tmp_path / "out", dtype="float32", told=Told(kind=TOLD.kind))
    assert near(load(tmp_path / "out"), expected(plain, state, "lora_{}.weight", prefix))


def test_a_weight_that_is_stored_turned(tmp_path: Path) -> None:
    path = "transformer.h.0.mlp.c_fc"
    weight = torch.randn(6, 10)
    base = write_base(tmp_path / "base", {f"{path}.weight": weight}, config={"model_type": "gpt2"})
    a, b = torch.randn(2, 10), torch.randn(10, 2)
    save_file({f"{path}.lora_A": a, f"{path}.lora_B": b}, tmp_path / "lora.safetensors")
    loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", dtype="float32",
                   told=TOLD)  # fmt: skip
    found = load(tmp_path / "out")[f"{path}.weight"]
    assert torch.allclose(found, weight + (3 * b @ a @ weight.T).T, atol=1e-5)


def test_it_is_asked_for_where_only_that_fits(base: Path, tmp_path: Path) -> None:
    save_file(factors("lora_{}.weight"), tmp_path / "lora.safetensors")
    with pytest.raises(LoraToolError, match=r"up_proj.*--kind multiplicative"):
        loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", told=Told(alpha=6))


def test_it_is_not_offered_where_it_would_be_refused(base: Path, tmp_path: Path) -> None:
    """An adapter of another model, of which one part alone could be so, gets no such hint."""
    state = factors("lora_{}.weight")
    state |= {
        "layers.7.o.lora_A.weight": torch.ones(2, 4),
        "layers.7.o.lora_B.weight": torch.ones(6, 2),
    }
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(LoraToolError, match="do not fit") as caught:
        loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", told=Told(alpha=6))
    assert "multiplicative" not in str(caught.value)


def test_what_is_not_so_is_refused(base: Path, tmp_path: Path) -> None:
    state = {f"{UP}.lora_A": torch.randn(2, 6), f"{UP}.lora_B": torch.randn(10, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(LoraToolError, match=r"not \[r, 10\] and \[10, r\]"):
        loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", told=TOLD)


def test_the_weight_must_be_known(base: Path, tmp_path: Path) -> None:
    state = factors("lora_{}")
    save_file(state, tmp_path / "lora.safetensors")
    report = loratool.inspect(tmp_path / "lora.safetensors", told=TOLD)
    assert "weight-unknown" in codes(report)
    assert "weight-unknown" not in codes(
        loratool.inspect(tmp_path / "lora.safetensors", told=TOLD, base=base)
    )
    with pytest.raises(LoraToolError, match="give the base"):
        loratool.resize(tmp_path / "lora.safetensors", tmp_path / "out", rank=1, told=TOLD)


def test_the_change_of_one_base_is_an_adapter_for_it(
    plain: State, base: Path, tmp_path: Path
) -> None:
    state = factors("lora_{}")
    file = tmp_path / "lora.safetensors"
    save_file(state, file)
    given: dict[str, Any] = {"told": TOLD, "base": base}
    loratool.combine([file, file], tmp_path / "both", weights=[0.5, 0.5], **given)
    loratool.merge(base, tmp_path / "both", tmp_path / "out", dtype="float32")
    assert near(load(tmp_path / "out"), expected(plain, state, "lora_{}"))
    loratool.resize(file, tmp_path / "two", rank=2, **given)
    loratool.merge(base, tmp_path / "two", tmp_path / "again", dtype="float32")
    assert near(load(tmp_path / "again"), expected(plain, state, "lora_{}"))


def test_a_merge_is_taken_back_by_its_undo_file_alone(
    plain: State, base: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    save_file(factors("lora_{}"), file)
    loratool.merge(base, file, out, dtype="base", told=TOLD, reversible=True)
    assert loratool.verify(out, base, file).verdict == "yes"
    loratool.unmerge(out, file, tmp_path / "back")
    assert same(load(tmp_path / "back"), plain)
    with pytest.raises(LoraToolError, match="2 tensors were multiplied"):
        loratool.unmerge(out, file, tmp_path / "less", subtract=True)


def test_the_product_is_rounded_once(base: Path, plain: State, tmp_path: Path) -> None:
    """A·W is summed in float64, so that no order of its sums can be seen."""
    from loratool.adapters.reading import read_adapter
    from loratool.models.checkpoint import open_checkpoint

    state = factors("lora_{}")
    save_file(state, tmp_path / "lora.safetensors")
    adapter = read_adapter(tmp_path / "lora.safetensors", TOLD, open_checkpoint(base))
    pair = adapter.modules[UP].left_right()
    assert pair is not None
    exact = state[f"{UP}.lora_A"].double() @ plain[f"{UP}.weight"].double()
    assert np.array_equal(pair[1], exact.float().numpy())
