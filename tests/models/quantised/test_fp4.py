"""FP4 codes times scales of groups: NVFP4, MXFP4, and the experts of gpt-oss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dequantising import opened, same_bits, unreadable, values
from helpers.files import State

W = "model.layers.0.self_attn.q_proj"
FP8 = torch.float8_e4m3fn
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def octets(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=made, dtype=torch.uint8)


def fp4(packed: torch.Tensor) -> torch.Tensor:
    """The values of rows of bytes, one by one, low halves first."""
    codes = [code for octet in packed.reshape(-1).tolist() for code in (octet & 15, octet >> 4)]
    numbers = [(-1) ** (code >> 3) * MAGNITUDES[code & 7] for code in codes]
    found = torch.tensor(numbers, dtype=torch.float32)
    found[torch.tensor(codes) == 8] = -0.0
    return found.reshape(*packed.shape[:-1], -1)


def product(packed: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Codes times scales of groups of a row, in float64 and rounded once."""
    numbers = fp4(packed)
    spread = scale.double().repeat_interleave(group, -1)[..., : numbers.shape[-1]]
    return (numbers.double() * spread).float()


def powers(octets: torch.Tensor) -> torch.Tensor:
    return torch.exp2(octets.double() - 127)


SIZES = [(1, 1), (3, 8), (5, 20), (66, 40)]


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    """A power of two for 32 values, from the least to the largest; the last group may be short."""
    for case, (rows, width) in enumerate(SIZES):
        packed = octets(rows, width, seed=case)
        scale = octets(rows, -(-width // 16), high=252, seed=case)
        stored = {f"{W}.weight_packed": packed, f"{W}.weight_scale": scale}
        base = opened(tmp_path / str(case), stored)
        assert base.title == "MXFP4"
        assert same_bits(values(base, f"{W}.weight"), product(packed, powers(scale), 32))


def test_mxfp4_of_transformers(tmp_path: Path) -> None:
    """DeepSeek V4's experts: bytes that are called int8, with scales beside FP8 in blocks."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    stack, plain = "model.layers.0.mlp.experts.gate_up_proj", "layers.0.ffn.experts.0.w1"
    packed, scale = octets(2, 6, 32), octets(2, 6, 2, low=100, high=140)
    as_powers = scale.view(torch.float8_e8m0fnu)
    stored: State = {
        stack: packed.view(torch.int8), f"{stack}_scale_inv": powers(scale).float(),
        f"{plain}.weight": packed[0].view(torch.int8), f"{plain}.scale": as_powers[0],
        f"{W}.weight": torch.ones(3, 4).to(FP8), f"{W}.scale": as_powers[0, :1, :1],
    }  # fmt: skip
    base = opened(tmp_path, stored, settings)
    expected = product(packed, powers(scale), 32)
    assert same_bits(values(base, stack), expected)
    assert same_bits(values(base, f"{plain}.weight"), expected[0])
    assert base.title == "MXFP4 and FP8 in blocks of 128×128"


@pytest.mark.parametrize("maker", ["compressed-tensors", "ModelOpt"])
def test_nvfp4(tmp_path: Path, maker: str) -> None:
    """One writes a factor that divides, the other one that multiplies; the scale that comes of it
    is rounded to float32 before it is multiplied."""
    for case, (rows, width) in enumerate(SIZES):
        packed = octets(rows, width, seed=case)
        scale = octets(rows, -(-width // 8), high=127, seed=case).view(FP8)
        factor = torch.tensor([0.3713 + case])
        if maker == "ModelOpt":
            roles = ("weight", "weight_scale", "weight_scale_2")
            exact = scale.float().numpy() * factor.numpy()
            factor = factor.reshape(())
        else:
            roles = ("weight_packed", "weight_scale", "weight_global_scale")
            exact = scale.float().numpy() / factor.numpy()
        assert exact.dtype == np.float32
        parts = dict(zip(roles, (packed, scale, factor), strict=True))
        extra = {f"{W}.input_scale": torch.ones(1), f"{W}.input_global_scale": torch.ones(1)}
        stored = {f"{W}.{role}": part for role, part in parts.items()} | extra
        base = opened(tmp_path / str(case), stored)
        assert base.title == "NVFP4"
        found = values(base, f"{W}.weight")
        assert same_bits(found, product(packed, torch.from_numpy(exact), 16))
        assert len(base.weights[f"{W}.weight"].stored_as.extras) == 2


EXPERTS = "model.layers.0.mlp.experts.down_proj"


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Codes are stored [experts, out, in], the plain model has [experts, in, out]."""
    for case, (experts, out, groups) in enumerate(itertools.product((1, 3), (1, 10), (1, 3))):
        blocks = octets(experts, out, groups, 16, seed=case)
        scales = octets(experts, out, groups, high=252, seed=case)
        stored = {
            f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales,
            f"{EXPERTS}_bias": torch.ones(experts, out),
        }  # fmt: skip
        base = opened(tmp_path / str(case), stored, {"quant_method": "mxfp4"})
        assert base.tensors.keys() == {EXPERTS, f"{EXPERTS}_bias"}
        expected = product(blocks.flatten(-2), powers(scales), 32).transpose(1, 2)
        assert same_bits(values(base, EXPERTS), expected)


def test_experts_larger_than_a_block(tmp_path: Path) -> None:
    """A block of the plain model is some of an expert, or the end of one and the next."""
    blocks, scales = octets(3, 3000, 5, 16), octets(3, 3000, 5, low=120, high=130)
    stored = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}
    values_of_table = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])
    codes = torch.stack([blocks & 15, blocks >> 4], -1).reshape(3, 3000, 160).int()
    scale = powers(scales).float().repeat_interleave(32, -1)
    expected = (values_of_table[codes] * scale).transpose(1, 2).contiguous()
    assert same_bits(values(opened(tmp_path, stored), EXPERTS), expected)


def nv(**changes: torch.Tensor | None) -> State:
    """A good weight in NVFP4 of compressed-tensors, with changes, or without what is None."""
    parts: dict[str, torch.Tensor | None] = {
        "weight_packed": octets(4, 32), "weight_scale": torch.ones(4, 4).to(FP8),
        "weight_global_scale": torch.ones(1), **changes,
    }  # fmt: skip
    return {f"{W}.{role}": part for role, part in parts.items() if part is not None}


def mx(**changes: torch.Tensor | None) -> State:
    scale = octets(4, 2, low=100, high=140)
    return nv(**{"weight_scale": scale, "weight_global_scale": None, **changes})


def optimised(**changes: torch.Tensor | None) -> State:
    weight = {"weight": octets(4, 32), "weight_scale_2": torch.ones(())}
    return nv(**{"weight_packed": None, "weight_global_scale": None, **weight, **changes})


def experts(**changes: torch.Tensor | None) -> State:
    parts: dict[str, torch.Tensor | None] = {
        "blocks": octets(2, 4, 2, 16), "scales": octets(2, 4, 2, low=100, high=140), **changes,
    }  # fmt: skip
    return {f"{EXPERTS}_{role}": part for role, part in parts.items() if part is not None}


def with_octet(value: int, *shape: int) -> torch.Tensor:
    made = torch.full(shape, 120, dtype=torch.uint8)
    made.view(-1)[-2] = value
    return made


MALFORMED: dict[str, tuple[State, tuple[str, ...]]] = {
    "nv-no-codes": (nv(weight_packed=None), ("weight_packed is missing",)),
    "nv-no-scale": (nv(weight_scale=None), ("weight_scale is missing",)),
    "nv-no-factor": (nv(weight_global_scale=None), ("weight_global_scale is missing",)),
    "nv-short": (nv(weight_scale=torch.ones(4, 3).to(FP8)), ("[4, 3]", "[4, 4]")),
    "nv-floats": (nv(weight_scale=torch.ones(4, 4)), ("weight_scale is F32", "F8_E4M3")),
    "nv-nan": (nv(weight_scale=with_octet(0x7F, 4, 4).view(FP8)), ("weight_scale", "NaN")),
    "nv-two-factors": (nv(weight_global_scale=torch.ones(2)), ("weight_global_scale", "[2]")),
    "nv-zero-factor": (nv(weight_global_scale=torch.zeros(1)), ("weight_global_scale", "0.0")),
    "nv-nan-factor": (nv(weight_global_scale=torch.full((1,), np.nan)), ("_global_scale", "nan")),
    "nv-small-factor": (nv(weight_global_scale=torch.full((1,), 1e-39)), ("float32",)),
    "nv-vector": (nv(weight_packed=octets(32)), ("no matrix",)),
    "nv-scalar": (nv(weight_packed=octets(1).reshape(())), ("no matrix",)),
    "nv-empty": (nv(weight_packed=octets(0, 4)), ("no matrix",)),
    "mx-no-codes": (mx(weight_packed=None), ("weight_scale",)),
    "mx-short": (mx(weight_scale=octets(4, 1)), ("[4, 1]", "[4, 2]")),
    "mx-nan": (mx(weight_scale=with_octet(255, 4, 2)), ("weight_scale", "NaN")),
    "mx-too-large": (mx(weight_scale=with_octet(254, 4, 2)), ("weight_scale", "float32")),
    "mo-no-factor": (optimised(weight_scale_2=None), ("weight_scale_2 is missing",)),
    "mo-no-scale": (optimised(weight_scale=None), ("weight_scale is missing",)),
    "mo-no-codes": (optimised(weight=None), ("weight is missing",)),
    "mo-rescaled": (optimised(pre_quant_scale=torch.ones(64)), ("pre_quant_scale", "rescaled")),
    "mo-int4": (
        nv(weight=octets(4, 32), pre_quant_scale=torch.ones(64), weight_packed=None,
           weight_scale=torch.ones(4, 1), weight_global_scale=None),
        ("pre_quant_scale", "rescaled"),
    ),
    "oss-no-blocks": (experts(blocks=None), ("blocks is missing",)),
    "oss-no-scales": (experts(scales=None), ("scales is missing",)),
    "oss-wide": (experts(blocks=octets(2, 4, 2, 8)), ("_blocks", "[2, 4, 2, 8]", "16")),
    "oss-flat": (experts(blocks=octets(2, 4, 32)), ("_blocks", "[2, 4, 32]")),
    "oss-short": (experts(scales=octets(2, 4, 1)), ("_scales", "[2, 4, 1]", "[2, 4, 2]")),
    "oss-floats": (experts(blocks=torch.ones(2, 4, 2, 16)), ("_blocks", "F32")),
    "oss-nan": (experts(scales=with_octet(255, 2, 4, 2)), ("_scales", "NaN")),
    "oss-too-large": (experts(scales=with_octet(254, 2, 4, 2)), ("_scales", "float32")),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_number_comes_of_is_refused(tmp_path: Path, case: str) -> None:
    """One clear error that names the tensor, and no value of it."""
    stored, parts = MALFORMED[case]
    unreadable(tmp_path, stored, None, *parts)


def test_other_packed_floats_are_refused(tmp_path: Path) -> None:
    """MXFP6 has four codes in three bytes: neither of 4 bits nor read."""
    settings = {"config_groups": {"a": {"weights": {"num_bits": 6, "group_size": 32}}}}
    stored = mx(weight_packed=octets(4, 48), weight_scale=octets(4, 2, low=100, high=140))
    unreadable(tmp_path, stored, settings, "weight_packed", "6 bits")


def test_packed_stacks_of_other_names_are_refused(tmp_path: Path) -> None:
    """Bytes where a plain model has floats are no plain model, whatever lies beside them."""
    name = "model.layers.0.mlp.experts.w13_weight"
    stored = {
        name: octets(2, 4, 32), f"{name}_scale": torch.ones(2, 4, 4).to(FP8),
        f"{name}_amax": torch.ones(2),
    }  # fmt: skip
    unreadable(tmp_path, stored, None, name)


@pytest.mark.parametrize("value", [0, -5, "x", 10**30, [16], True])
def test_groups_that_are_none_are_refused(tmp_path: Path, value: Any) -> None:
    """Hostile values in the config end in one line that says where they stand."""
    settings = {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": value}}}}
    unreadable(tmp_path, nv(), settings, "config_groups.a.weights: group_size is")
