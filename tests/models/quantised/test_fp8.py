"""Codes of 8 bits times scales: FP8 per tensor, row, block and group, MXFP8, INT8."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dequantising import lay, opened, same_bits, unreadable, values
from helpers.files import State, write_base

from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.models.quantised.numbers import decode_e4m3

W = "model.layers.0.self_attn.q_proj"
FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """All codes but those of NaN, in any order."""
    made = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 254, shape, generator=made)
    return (bits + (bits >= 127).int()).to(torch.uint8).view(FP8)


def scales(dtype: torch.dtype, *shape: int, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.randint(100, 150, shape, generator=made, dtype=torch.uint8).view(dtype)
    return (torch.rand(shape, generator=made) * 0.01 + 1e-4).to(dtype)


def number(scale: torch.Tensor) -> torch.Tensor:
    """Scales as numbers; bytes are exponents."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.double()


def by_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The weight, block by block, in float64 and rounded once."""
    found = weight.float().double()
    down, across = (range(0, size, step) for size, step in zip(found.shape, block, strict=True))
    for (i, row), (j, column) in itertools.product(enumerate(down), enumerate(across)):
        found[row : row + block[0], column : column + block[1]] *= number(scale)[i, j]
    return found.float()


def parts(size: int, block: int) -> int:
    return -(-size // block)


def test_all_codes_have_their_values() -> None:
    """Each of the 254 numbers of E4M3, subnormal ones and the negative zero too."""
    all_codes = torch.arange(256).to(torch.uint8)
    out = np.empty(256, np.float32)
    decode_e4m3(all_codes.numpy(), out)
    known = all_codes.view(FP8).float()
    finite = known.isfinite()
    assert int(finite.sum()) == 254
    assert same_bits(torch.from_numpy(out)[finite], known[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_blocks_of_any_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """Matrices of any size in blocks of any size, the last ones short, or larger than they are."""
    sizes = [(1, 1), (3, 5), (17, 33), (64, 48), (130, 259)]
    blocks = [(128, 128), (16, 16), (64, 32), (7, 3), (1, 40), (200, 300)]
    for case, (size, block) in enumerate(itertools.product(sizes, blocks)):
        weight = codes(*size, seed=case)
        scale = scales(dtype, parts(size[0], block[0]), parts(size[1], block[1]), seed=case)
        settings = {"quant_method": "fp8", "weight_block_size": list(block)}
        stored = {f"{W}.weight": weight, f"{W}.weight_scale_inv": scale}
        base = opened(tmp_path / str(case), stored, settings)
        assert list(base.tensors) == [f"{W}.weight"]
        assert same_bits(values(base, f"{W}.weight"), by_blocks(weight, scale, block)), (
            size,
            block,
        )


NAMES = {
    "deepseek-v3": ("weight", "weight_scale_inv"), "deepseek-v4": ("weight", "scale"),
    "mistral": ("weight", "qscale_weight"), "compressed-tensors": ("weight", "weight_scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_scale(tmp_path: Path, name: str) -> None:
    """The scale of a block under each of its names."""
    weight, scale = codes(20, 40), scales(torch.float32, 2, 3)
    roles = NAMES[name]
    base = opened(tmp_path, {f"{W}.{roles[0]}": weight, f"{W}.{roles[1]}": scale}, BLOCKS)
    assert same_bits(values(base, f"{W}.weight"), by_blocks(weight, scale, (16, 16)))


WHOLE: dict[str, tuple[int, ...]] = {
    "scalar": (), "one": (1,), "one-of-a-matrix": (1, 1), "rows": (6,), "column": (6, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", WHOLE)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_scales_of_tensors_and_rows(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    """One scale, or one of a row, in every shape in which they are saved; INT8 likewise."""
    weight = codes(6, 10)
    weight = weight if dtype == FP8 else weight.view(torch.int8)
    scale = scales(torch.bfloat16, *WHOLE[shape])
    base = opened(tmp_path, {f"{W}.weight": weight, f"{W}.weight_scale": scale})
    spread = scale.float().reshape(-1, 1).expand(6, 1)
    assert same_bits(values(base, f"{W}.weight"), weight.float() * spread)
    kind = "FP8" if dtype == FP8 else "INT8"
    assert base.title == f"{kind} per {'tensor' if scale.numel() == 1 else 'channel'}"


def test_zero_points_of_int8(tmp_path: Path) -> None:
    """Asymmetric W8A8: (code − zero)·scale."""
    weight = codes(6, 10).view(torch.int8)
    zero = torch.tensor([-128, -1, 0, 1, 64, 127], dtype=torch.int8)[:, None]
    scale = scales(torch.bfloat16, 6, 1)
    stored = {f"{W}.weight": weight, f"{W}.weight_scale": scale, f"{W}.weight_zero_point": zero}
    expected = (weight.float() - zero.float()) * scale.float()
    assert same_bits(values(opened(tmp_path, stored), f"{W}.weight"), expected)


def test_groups_of_a_row(tmp_path: Path) -> None:
    """MXFP8, without a config, and groups of another size that the config names."""
    for case, (group, dtype) in enumerate({32: torch.uint8, 24: torch.bfloat16}.items()):
        weight, scale = codes(5, 100), scales(dtype, 5, parts(100, group))
        stored = {f"{W}.weight": weight, f"{W}.weight_scale": scale}
        said = {"config_groups": {"a": {"weights": {"num_bits": 8, "group_size": 24}}}}
        base = opened(tmp_path / str(case), stored, None if group == 32 else said)
        assert same_bits(values(base, f"{W}.weight"), by_blocks(weight, scale, (1, group)))
        assert base.title == ("MXFP8" if group == 32 else "FP8 in groups of 24")


def test_scales_of_four_dimensions(tmp_path: Path) -> None:
    """ModelOpt's fp8_pb_wo, blocks of 128 with short last ones."""
    weight, scale = codes(130, 260), scales(torch.float32, 2, 1, 3, 1)
    stored = {f"{W}.weight": weight, f"{W}.weight_scale": scale}
    base = opened(tmp_path, stored, {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"})
    expected = by_blocks(weight, scale.reshape(2, 3), (128, 128))
    assert same_bits(values(base, f"{W}.weight"), expected)


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "up_proj"])
def test_stacks_of_experts(tmp_path: Path, name: str) -> None:
    """A parameter with a matrix for each expert: blocks begin anew with every one."""
    weight, scale = codes(3, 40, 33), scales(torch.float32, 3, 3, 3)
    stored = {f"{EXPERTS}.{name}": weight, f"{EXPERTS}.{name}_scale_inv": scale}
    base = opened(tmp_path, stored, BLOCKS)
    expected = [by_blocks(w, s, (16, 16)) for w, s in zip(weight, scale, strict=True)]
    assert same_bits(values(base, f"{EXPERTS}.{name}"), torch.stack(expected))


def test_gate_and_up_joined_with_their_scales(tmp_path: Path) -> None:
    """Halves of 40 rows that were quantised apart have blocks of their own, 3 each."""
    halves = [codes(2, 40, 33, seed=n) for n in (0, 1)]
    of_halves = [scales(torch.float32, 2, 3, 3, seed=n) for n in (2, 3)]
    name = f"{EXPERTS}.gate_up_proj"
    stored = {name: torch.cat(halves, 1), f"{name}_scale_inv": torch.cat(of_halves, 1)}
    expected = [
        torch.cat([by_blocks(w[n], s[n], (16, 16)) for w, s in zip(halves, of_halves, strict=True)])
        for n in range(2)
    ]
    assert same_bits(values(opened(tmp_path, stored, BLOCKS), name), torch.stack(expected))


def test_gate_and_up_that_may_be_joined_or_not(tmp_path: Path) -> None:
    """Two rows of scales for 20 rows in blocks of 16: 16 and 4, or 10 and 10?"""
    name = f"{EXPERTS}.gate_up_proj"
    stored = {name: codes(2, 20, 16), f"{name}_scale_inv": scales(torch.float32, 2, 2, 1)}
    unreadable(tmp_path, stored, BLOCKS, f"{name}_scale_inv", "16×16 in 20 rows", "in 10 rows")


STACKED: dict[str, tuple[int, ...]] = {
    "matrix": (3, 1, 1), "matrix-flat": (3,), "rows": (3, 4, 1), "all": (1,), "halves": (3, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", STACKED)
def test_stacks_with_few_scales(tmp_path: Path, shape: str) -> None:
    """A scale of an expert, of its rows, of all of them, or of gate and up."""
    name = f"{EXPERTS}.gate_up_proj"
    weight, scale = codes(3, 4, 6), scales(torch.float32, *STACKED[shape])
    settings = {"quant_method": "fp8", "weight_block_size": None}
    base = opened(tmp_path, {name: weight, f"{name}_scale_inv": scale}, settings)
    spread = {"halves": lambda s: s.repeat_interleave(2, 1)}.get(shape, lambda s: s)(scale)
    spread = spread.reshape(spread.shape + (1,) * (3 - spread.ndim))
    assert same_bits(values(base, name), weight.float() * spread)


def test_fbgemms_stacks_are_stored_turned(tmp_path: Path) -> None:
    """[experts, in, out], with a scale for each column: in both shapes that it saves."""
    settings = {"quant_method": "fbgemm_fp8"}
    for case, shape in enumerate([(2, 1, 6), (2, 6, 1)]):
        weight, scale = codes(2, 6, 6), scales(torch.float32, *shape)
        name = f"{EXPERTS}.down_proj"
        base = opened(tmp_path / str(case), {name: weight, f"{name}_scale": scale}, settings)
        assert same_bits(values(base, name), weight.float() * scale.reshape(2, 1, 6))


def test_scales_at_the_ends_of_their_range(tmp_path: Path) -> None:
    """2⁻¹²⁷ is no normal float32 and exact all the same; 2¹²⁷ is fine where the codes are small."""
    weight = torch.tensor([[0x01, 0x38], [0x81, 0x08]], dtype=torch.uint8).view(FP8)
    scale = torch.tensor([[0], [254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    stored = {f"{W}.weight": weight, f"{W}.weight_scale": scale}
    settings = {"config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
    found = values(opened(tmp_path, stored, settings), f"{W}.weight")
    expected = [[2.0**-136, 2.0**-127], [-(2.0**118), 2.0**121]]
    assert found.tolist() == expected


def test_scales_in_another_shard(tmp_path: Path) -> None:
    """The index finds them; the weight is where its codes are."""
    weight, scale = codes(20, 40), scales(torch.float32, 2, 3)
    shards = {f"{W}.weight_scale_inv": scale}, {f"{W}.weight": weight, "norm.weight": torch.ones(3)}
    folder = write_base(tmp_path / "base", *shards, config={"quantization_config": BLOCKS})
    base = dequantised(open_checkpoint(folder))
    assert isinstance(base, Dequantised)
    assert list(base.shards) == ["model-00002-of-00002.safetensors"]
    assert same_bits(values(base, f"{W}.weight"), by_blocks(weight, scale, (16, 16)))


def test_scales_of_activations_belong_to_the_quantisation(tmp_path: Path) -> None:
    """Those of a module go with its weight, those of the cache with the base; neither is plain."""
    attention = "model.layers.0.self_attn"
    stored: State = {f"{W}.weight": codes(4, 4), f"{W}.weight_scale": torch.ones(1)}
    own = [f"{W}.input_scale", f"{W}.output_scale", f"{W}.q_scale"]
    cache = [f"{attention}.k_scale", f"{attention}.v_scale", f"{attention}.k_proj.k_scale"]
    stored |= {name: torch.ones(1) for name in own + cache}
    stored[f"{attention}.k_proj.weight"] = torch.ones(4, 4)
    base = opened(tmp_path, stored)
    assert base.tensors.keys() == {f"{W}.weight", f"{attention}.k_proj.weight"}
    assert {info.name for info in base.weights[f"{W}.weight"].stored_as.extras} == set(own)
    assert base.extras == set(cache)


def test_a_plain_base_keeps_scales_of_its_cache(tmp_path: Path) -> None:
    """Where no weight is quantised there is nothing to open."""
    stored = {f"{W}.weight": torch.ones(4, 4), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    base = open_checkpoint(lay(tmp_path, stored, {"quant_method": "compressed-tensors"}))
    assert dequantised(base) is base


def bad(**changes: Any) -> State:
    """A good weight in blocks, with tensors of these roles changed or, where None, left out."""
    stored: State = {"weight": codes(40, 40), "weight_scale_inv": scales(torch.float32, 3, 3)}
    stored.update(changes)
    return {f"{W}.{role}": value for role, value in stored.items() if value is not None}


def one_at(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.ones(3, 3)
    made[2, 1] = value
    return made.to(dtype)


def byte_at(value: int, *shape: int) -> torch.Tensor:
    made = torch.full(shape, 120, dtype=torch.uint8)
    made.view(-1)[-2] = value
    return made


MALFORMED: dict[str, tuple[State, tuple[str, ...]]] = {
    "no-scale": (bad(weight_scale_inv=None), (f"{W}.weight", "FP8", "scale is missing")),
    "no-weight": (bad(weight=None), (f"{W}.weight_scale_inv", "is missing")),
    "plain": (bad(weight=torch.ones(40, 40)), (f"{W}.weight F32", "plain", "weight_scale_inv")),
    "short": (bad(weight_scale_inv=torch.ones(3, 2)), ("[3, 2]", "[3, 3]")),
    "wide": (bad(weight_scale_inv=torch.ones(4, 3)), ("[4, 3]", "[3, 3]")),
    "rows": (bad(weight_scale_inv=torch.ones(40, 1)), ("[40, 1]", "[3, 3]")),
    "one": (bad(weight_scale_inv=torch.ones(1)), ("[1]", "[3, 3]")),
    "flat": (bad(weight_scale_inv=torch.ones(9)), ("[9]", "[3, 3]")),
    "whole-numbers": (bad(weight_scale_inv=torch.ones(3, 3, dtype=torch.int32)), ("I32", "F32")),
    "double": (bad(weight_scale_inv=torch.ones(3, 3).double()), ("F64", "F32")),
    "vector": (bad(weight=codes(40)), (f"{W}.weight", "[40]", "no matrix")),
    "scalar": (bad(weight=codes(1).reshape(())), (f"{W}.weight", "no matrix")),
    "empty": (bad(weight=codes(0, 40)), ("[0, 40]", "no matrix")),
    "e5m2": (bad(weight=torch.ones(40, 40).to(torch.float8_e5m2)), ("e5m2", "e4m3fn")),
    "fnuz": (bad(weight=torch.ones(40, 40).to(torch.float8_e4m3fnuz)), ("e4m3fnuz", "e4m3fn")),
    "nan-scale": (bad(weight_scale_inv=one_at(float("nan"))), ("weight_scale_inv", "NaN")),
    "infinite": (bad(weight_scale_inv=one_at(float("inf"))), ("weight_scale_inv", "infinity")),
    "infinite-bf16": (
        bad(weight_scale_inv=one_at(float("-inf"), torch.bfloat16)), ("_scale_inv", "infinity"),
    ),
    "too-large": (bad(weight_scale_inv=one_at(3e38)), ("weight_scale_inv", "float32")),
    "e8m0-nan": (bad(weight_scale_inv=byte_at(255, 3, 3)), ("weight_scale_inv", "NaN")),
    "nan-code": (bad(weight=byte_at(0x7F, 40, 40).view(FP8)), (f"{W}.weight", "NaN")),
    "negative-nan-code": (bad(weight=byte_at(0xFF, 40, 40).view(FP8)), (f"{W}.weight", "NaN")),
    "rescaled": (bad(pre_quant_scale=torch.ones(40)), ("pre_quant_scale", "rescaled")),
    "zero-point": (bad(weight_zero_point=torch.zeros(3, 3)), ("weight_zero_point", "meaning")),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_number_comes_of_is_refused(tmp_path: Path, case: str) -> None:
    """One clear error that names the tensor, and no value of it."""
    stored, words = MALFORMED[case]
    unreadable(tmp_path, stored, BLOCKS, *words)


HOSTILE: list[Any] = [
    [0, 0], [-1, 16], [16], [16, 16, 16], ["a", 16], [[16, 16]], [1.5, 2], [10**30, 1], "x", {}, 16,
    True, [True, True], [None, None], [],
]  # fmt: skip


@pytest.mark.parametrize("block", HOSTILE, ids=json.dumps)
def test_blocks_that_are_none_are_refused(tmp_path: Path, block: Any) -> None:
    """What a config says of blocks is two whole numbers, or the file is refused."""
    settings = {"quant_method": "fp8", "weight_block_size": block}
    unreadable(tmp_path, bad(), settings, "quantization_config: weight_block_size is")


GROUPS: list[Any] = [
    "x", ["x"], {"a": 1}, {"a": {"weights": "x"}}, {"a": {"weights": {"group_size": 0}}},
    {"a": {"weights": {"group_size": -5}}}, {"a": {"weights": {"group_size": "x"}}},
    {"a": {"weights": {"group_size": 10**30}}}, {"a": {"weights": {"num_bits": 0}}},
    {"a": {"weights": {"num_bits": [8]}}}, {"a": {"weights": {"block_structure": [0, 0]}}},
    {"a": {"weights": {"block_structure": "0x128"}}}, {"\n\x1b": {"weights": {"num_bits": "8"}}},
]  # fmt: skip


@pytest.mark.parametrize("groups", GROUPS, ids=json.dumps)
def test_groups_that_are_none_are_refused(tmp_path: Path, groups: Any) -> None:
    """Hostile values in groups of modules end in one line that says where they stand."""
    settings = {"quant_method": "compressed-tensors", "config_groups": groups}
    error = unreadable(tmp_path, bad(), settings, "config.json", "config_groups")
    assert "\n" not in error.message
    assert len(error.message) < 500


def test_blocks_as_they_were_once_written(tmp_path: Path) -> None:
    """compressed-tensors wrote "16x16" before it wrote a list."""
    settings = {"config_groups": {"a": {"weights": {"num_bits": 8, "block_structure": "16x16"}}}}
    weight, scale = codes(20, 40), scales(torch.float32, 2, 3)
    base = opened(tmp_path, {f"{W}.weight": weight, f"{W}.weight_scale": scale}, settings)
    assert same_bits(values(base, f"{W}.weight"), by_blocks(weight, scale, (16, 16)))
