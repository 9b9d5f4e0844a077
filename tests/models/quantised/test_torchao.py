"""torchao against its definition: what codes and scales are, the metadata of files says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import State, write_index
from helpers.laying import changed, lay, opened, refusal, whole
from safetensors.torch import save_file

Metadata = dict[str, Any]


def torchao(
    shape: tuple[int, ...] = (6, 20),
    block: tuple[int, ...] = (1, 5),
    kind: str = "Int8Tensor",
    scales: torch.dtype = torch.float32,
    zeros: bool = True,
    name: str = "weight",
) -> tuple[State, Metadata, np.ndarray]:
    """The tensors of one parameter, what the metadata says of it, and what it stands for."""
    made = torch.Generator().manual_seed(sum(shape) + len(block))
    few = tuple(n // b for n, b in zip(shape, block, strict=True))
    scale = torch.randn(few, generator=made).to(scales)
    data: State = {"scale": scale}
    if kind == "Float8Tensor":
        codes = torch.randn(shape, generator=made).to(torch.float8_e4m3fn)
        zero = torch.zeros(few)
    else:
        codes = torch.randint(-8, 8, shape, generator=made).to(torch.int8)
        zero = torch.randint(-8, 8, few, generator=made).to(torch.int8) * zeros
        data |= {"zero_point": zero} if zeros else {}
    expected = np.empty(shape)
    for at in itertools.product(*map(range, shape)):
        of = tuple(i // b for i, b in zip(at, block, strict=True))
        expected[at] = (float(codes[at]) - float(zero[of])) * float(scale[of])
    fields: Metadata = {"block_size": list(block), "dtype": dtype("bfloat16")}
    if kind.startswith("Intx"):
        fields["target_dtype"] = dtype("int4")
    told = {"_type": kind, "_data": fields, "_tensor_data_names": ["qdata", *data]}
    tensors = {f"m._{name}_{role}": tensor for role, tensor in {"qdata": codes, **data}.items()}
    return tensors, told, expected


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def written(folder: Path, tensors: State, told: Any, name: str = "m.weight") -> Path:
    told = told if isinstance(told, str) else json.dumps(told)
    metadata = {"format": "pt", "tensor_names": json.dumps([name]), name: told}
    return lay(folder, tensors, {"quant_method": "torchao"}, metadata)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "int8-rows": ({"block": (1, 20)}, "torchao int8"),
    "int8-groups": ({}, "torchao int8"),
    "int8-blocks": ({"block": (2, 4)}, "torchao int8"),
    "int8-whole": ({"block": (6, 20)}, "torchao int8"),
    "int8-symmetric": ({"zeros": False}, "torchao int8"),
    "int4": ({"kind": "IntxUnpackedToInt8Tensor", "scales": torch.bfloat16}, "torchao int4"),
    "fp8-rows": ({"kind": "Float8Tensor", "block": (1, 20)}, "torchao FP8"),
    "fp8-blocks": ({"kind": "Float8Tensor", "block": (3, 10)}, "torchao FP8"),
    "experts": ({"shape": (3, 4, 6), "block": (1, 2, 3)}, "torchao int8"),
    "experts-fp8": (
        {"shape": (2, 3, 8), "block": (1, 1, 8), "kind": "Float8Tensor"}, "torchao FP8",
    ),
    "groups-of-one": ({"block": (1, 1)}, "torchao int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values(case: str, tmp_path: Path) -> None:
    """(code − zero)·scale of the block that a value is in, along every axis."""
    arguments, title = CASES[case]
    tensors, told, expected = torchao(**arguments)
    base = opened(written(tmp_path / "base", tensors, told))
    assert (base.title, list(base.tensors)) == (title, ["m.weight"])
    assert base.tensors["m.weight"].shape == expected.shape
    assert np.array_equal(whole(base, "m.weight"), expected.astype(np.float32))


def test_parameters_of_other_names(tmp_path: Path) -> None:
    """Stacks of experts are parameters without `.weight`."""
    tensors, told, expected = torchao((2, 4, 6), (1, 1, 6), name="gate_up_proj")
    base = opened(written(tmp_path / "base", tensors, told, "m.gate_up_proj"))
    assert np.array_equal(whole(base, "m.gate_up_proj"), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One scale for all of it may have any shape, and need no block_size."""
    tensors, told, _ = torchao(kind="Float8Tensor", block=(6, 20))
    tensors["m._weight_scale"] = torch.full(shape, 0.5)
    del told["_data"]["block_size"]
    found = whole(opened(written(tmp_path / "base", tensors, told)), "m.weight")
    assert np.array_equal(found, tensors["m._weight_qdata"].float().numpy() / 2)


def test_zeros_that_are_no_integers(tmp_path: Path) -> None:
    """The library takes them off in its own dtype, so the difference is rounded."""
    tensors, told, _ = torchao(kind="IntxUnpackedToInt8Tensor", scales=torch.bfloat16)
    zeros = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 9).bfloat16()
    tensors["m._weight_zero_point"] = zeros
    codes, scales = tensors["m._weight_qdata"], tensors["m._weight_scale"]
    rounded = codes.bfloat16() - zeros.repeat_interleave(5, 1)
    expected = rounded.float() * scales.float().repeat_interleave(5, 1)
    found = whole(opened(written(tmp_path / "base", tensors, told)), "m.weight")
    assert np.array_equal(found, expected.numpy())


def test_every_shard_has_metadata_of_its_own(tmp_path: Path) -> None:
    """What one shard says of its weights holds for these; parts may lie apart."""
    first, told_first, one = torchao()
    second, told_second, two = torchao(block=(1, 10))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    scale = first.pop("m._weight_scale")
    shards = {
        "model-00001-of-00002.safetensors": (first, {"m.weight": told_first}),
        "model-00002-of-00002.safetensors": (
            {"m._weight_scale": scale, **{n.replace("m.", "n."): t for n, t in second.items()}},
            {"n.weight": told_second},
        ),
    }
    for file, (tensors, told) in shards.items():
        metadata = {name: json.dumps(text) for name, text in told.items()}
        save_file(tensors, folder / file, {"format": "pt", **metadata})
    write_index(folder, {name: file for file, (found, _) in shards.items() for name in found})
    base = opened(folder)
    assert np.array_equal(whole(base, "m.weight"), one.astype(np.float32))
    assert np.array_equal(whole(base, "n.weight"), two.astype(np.float32))


def told(**changes: Any) -> Metadata:
    _, found, _ = torchao()
    return {**found, **{key: value for key, value in changes.items() if key.startswith("_")}}


def fields(**changes: Any) -> Metadata:
    _, found, _ = torchao()
    return {**found, "_data": {**found["_data"], **changes}}


MALFORMED: dict[str, tuple[dict[str, Any], Any, str]] = {
    # tensors in place of others, what the metadata says, words
    "no-scale": ({"_weight_scale": None}, told(), "its scale is missing"),
    "no-zero": ({"_weight_zero_point": None}, told(), "its zero_point is missing"),
    "int4": ({}, told(_type="Int4Tensor"), "torchao's Int4Tensor, and read are Int8Tensor"),
    "nvfp4": ({}, told(_type="NVFP4Tensor"), "torchao's NVFP4Tensor"),
    "plain": ({}, told(_type="torch.Tensor"), "torchao's torch.Tensor"),
    "no-type": ({}, told(_type=None), "torchao's null"),
    "odd-type": ({}, told(_type=["Int8Tensor"]), "torchao's"),
    "long-type": ({}, told(_type="x" * 100_000), "torchao's xxx"),
    "no-json": ({}, "[1", "is no JSON object"),
    "deep": ({}, "[" * 100_000, "is no JSON object"),
    "no-fields": ({}, told(_data=3), "has no fields of it"),
    "names-of-others": ({}, told(_tensor_data_names=["qdata", "qdata2"]), "its qdata2 is missing"),
    "no-block": ({}, fields(block_size=None), "its block_size is null"),
    "block-zero": ({}, fields(block_size=[1, 0]), "its block_size is [1, 0], expected sizes that"),
    "block-ragged": ({}, fields(block_size=[1, 6]), "expected sizes that divide [6, 20]"),
    "block-of-one-axis": ({}, fields(block_size=[5]), "its block_size is [5]"),
    "block-huge": ({}, fields(block_size=[1, 10**400]), "its block_size is"),
    "block-of-texts": ({}, fields(block_size=["1", "5"]), "its block_size is"),
    "block-other": ({}, fields(block_size=[1, 10]), "_weight_scale is [6, 4], expected [6, 2]"),
    "bits": (
        {}, {**fields(target_dtype=dtype("int9")), "_type": "IntxUnpackedToInt8Tensor"},
        "its target_dtype is",
    ),
    "dtype": (
        {"_weight_zero_point": torch.zeros(6, 4)}, fields(dtype=dtype("complex64")),
        "its dtype is",
    ),
    "short-zero": (
        {"_weight_zero_point": torch.zeros(6, 3, dtype=torch.int8)}, told(), "is [6, 3], expected",
    ),
    "codes-of-floats": ({"_weight_qdata": torch.zeros(6, 20)}, told(), "is F32, expected I8"),
    "codes-e5m2": (
        {"_weight_qdata": torch.zeros(6, 20).to(torch.float8_e5m2)}, told(_type="Float8Tensor"),
        "is F8_E5M2, expected F8_E4M3",
    ),
    "codes-flat": ({"_weight_qdata": torch.zeros(120, dtype=torch.int8)}, told(), "is no matrix"),
    "codes-nan": (
        {"_weight_qdata": torch.full((6, 20), torch.nan).to(torch.float8_e4m3fn),
         "_weight_zero_point": None},
        told(_type="Float8Tensor", _tensor_data_names=["qdata", "scale"]), "m._weight_qdata",
    ),
    "scale-nan": ({"_weight_scale": torch.full((6, 4), torch.nan)}, told(), "it holds NaN"),
    "scale-large": ({"_weight_scale": torch.full((6, 4), 3e38)}, told(), "float32 cannot hold"),
    "scaled-inputs": (
        {"_weight_act_pre_scale": torch.ones(20)}, told(), "multiplied by act_pre_scale",
    ),
    "plain-too": ({"weight": torch.zeros(6, 20)}, told(), "it has m.weight F32"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    """Classes that are packed otherwise are refused by name; so is what does not fit."""
    changes, said, words = MALFORMED[case]
    tensors, _, _ = torchao()
    refusal(written(tmp_path / "base", changed(tensors, changes), said), "m", words)


def test_metadata_that_was_dropped(tmp_path: Path) -> None:
    """Without it nothing says what the codes are."""
    tensors, _, _ = torchao()
    error = refusal(lay(tmp_path / "base", tensors), "metadata of its file does not say")
    assert "fetch the original" in error.hint


def test_scales_of_activations_go_along(tmp_path: Path) -> None:
    """What is for activations alone is no part of the weight, and goes where it goes."""
    tensors, said, expected = torchao()
    tensors["m._weight_act_quant_scale"] = torch.ones(1)
    base = opened(written(tmp_path / "base", tensors, said))
    assert list(base.tensors) == ["m.weight"]
    assert np.array_equal(whole(base, "m.weight"), expected.astype(np.float32))
