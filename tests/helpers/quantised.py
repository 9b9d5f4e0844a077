"""Small quantised bases, written by the formulas of their formats, without their libraries.

What is quantised are the matrices whose names end with `_proj.weight`, as real models have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.adapters import pair, write_adapter
from helpers.files import State, random_of, write_base

#: The 16 values of NF4. Source: bitsandbytes/functional.py (`create_normal_map`).
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip

#: Where a tensor lies: the number of its shard, by name.
Sharding = Callable[[str], int]


def is_quantised(name: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and name.endswith("_proj.weight")


def llama_state(width: int = 64, layers: int = 1, dtype: torch.dtype = torch.bfloat16) -> State:
    """The tensors of a small Llama; the MLP is half as wide again."""
    state = {
        "model.embed_tokens.weight": random_of(dtype, 32, width, seed=99),
        "model.norm.weight": random_of(dtype, width, seed=98),
        "lm_head.weight": random_of(dtype, 32, width, seed=97),
    }
    wide = width * 3 // 2
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 2, width),
        "self_attn.v_proj": (width // 2, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }  # fmt: skip
    for layer in range(layers):
        for place, (path, shape) in enumerate(shapes.items()):
            value = random_of(torch.float32, *shape, seed=10 * layer + place) * 0.1
            state[f"model.layers.{layer}.{path}.weight"] = value.to(dtype)
        norm = f"model.layers.{layer}.input_layernorm.weight"
        state[norm] = random_of(dtype, width, seed=10 * layer + 9)
    return state


def write_nf4_base(
    folder: Path,
    state: State,
    *,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
    shard_of: Sharding | None = None,
    config: dict[str, Any] | None = None,
) -> State:
    """A base as bitsandbytes saves it in 4 bit. Returns the plain model that it stands for, as
    float32; `dtype` is what the model had when it was quantised."""
    stored, plain = {}, {}
    for name, value in state.items():
        if is_quantised(name, value):
            parts, plain[name] = nf4(value, nested, dtype, storage)
            stored |= {f"{name}{role}": part for role, part in parts.items()}
        else:
            stored[name], plain[name] = value, value.float()
    method = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None,
    }  # fmt: skip
    _write(folder, stored, method, shard_of, config, dtype)
    return plain


def nf4(
    value: torch.Tensor, nested: bool, dtype: torch.dtype, storage: torch.dtype
) -> tuple[State, torch.Tensor]:
    """The parts of a weight in NF4, by what follows its name, and what they stand for."""
    flat = value.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None].clamp(min=1e-30))[..., None].sub(NF4).abs().argmin(-1)
    codes = codes.view(-1)[: len(flat) + len(flat) % 2].to(torch.uint8)
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    about = {
        "quant_type": "nf4", "blocksize": 64, "dtype": str(dtype).removeprefix("torch."),
        "shape": list(value.shape),
    }  # fmt: skip
    parts = {
        "": packed.view(-1).view(storage)[:, None],
        ".absmax": absmax,
        ".quant_map": NF4.clone(),
    }
    if nested:
        offset = absmax.mean()
        scales = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = scales.abs().amax(1)
        steps = torch.linspace(-1, 1, 256)
        near = (scales / largest[:, None].clamp(min=1e-30))[..., None].sub(steps).abs().argmin(-1)
        near = near.view(-1)[: len(absmax)]
        absmax = steps[near] * largest.repeat_interleave(256)[: len(absmax)] + offset
        parts |= {
            ".absmax": near.to(torch.uint8), ".nested_absmax": largest, ".nested_quant_map": steps,
        }  # fmt: skip
        about |= {
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item(),
        }  # fmt: skip
    state = torch.from_numpy(np.frombuffer(json.dumps(about).encode(), np.uint8).copy())
    parts[".quant_state.bitsandbytes__nf4"] = state
    known = NF4[codes.long()][: len(flat)] * absmax.repeat_interleave(64)[: len(flat)]
    return parts, known.view(value.shape).to(dtype).float()


def write_fp8_base(
    folder: Path,
    state: State,
    *,
    block: tuple[int, int] | None = (128, 128),
    shard_of: Sharding | None = None,
    config: dict[str, Any] | None = None,
) -> State:
    """A base as DeepSeek and Qwen publish them, in FP8 with a scale for each block (without
    `block` one for the whole matrix). Returns the plain model that it stands for, as float32."""
    stored, plain, left = {}, {}, []
    for name, value in state.items():
        if is_quantised(name, value):
            stored[name], stored[f"{name}_scale_inv"], plain[name] = fp8(value, block)
        else:
            stored[name], plain[name] = value, value.float()
            left += [name.removesuffix(".weight")] if value.ndim == 2 else []
    method: dict[str, Any] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "modules_to_not_convert": left,
    }  # fmt: skip
    if block is not None:
        method["weight_block_size"] = list(block)
    _write(folder, stored, method, shard_of, config, torch.bfloat16)
    return plain


def fp8(
    value: torch.Tensor, block: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes of a weight in FP8, its scales, and what they stand for."""
    rows, columns = value.shape
    height, width = block or (rows, columns)
    whole = torch.nn.functional.pad(value.float(), (0, -columns % width, 0, -rows % height))
    grid = whole.view(whole.shape[0] // height, height, whole.shape[1] // width, width)
    scales = grid.abs().amax((1, 3)).clamp(min=1e-12) / 448
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    codes = (value.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales if block else scales.reshape(1), codes.float() * spread


def _write(
    folder: Path,
    stored: State,
    method: dict[str, Any],
    shard_of: Sharding | None,
    config: dict[str, Any] | None,
    dtype: torch.dtype,
) -> None:
    named = {"dtype": str(dtype).removeprefix("torch."), "quantization_config": method}
    shards: dict[int, State] = {}
    for name, value in stored.items():
        shards.setdefault(shard_of(name) if shard_of else 0, {})[name] = value.contiguous()
    write_base(folder, *(shards[n] for n in sorted(shards)), config={**named, **(config or {})})


def adapter_on(folder: Path, shapes: dict[str, tuple[int, ...]], size: float = 0.1) -> Path:
    """An adapter with random factors on weights `[out, in]` of these names, or on stacks of them as
    parameters, `[experts, in, out]`."""
    tensors: dict[str, np.ndarray] = {}
    modules, parameters = set(), set()
    for seed, (name, shape) in enumerate(shapes.items()):
        path = name.removesuffix(".weight")
        if len(shape) == 2:
            modules.add(path.rpartition(".")[2])
            factors = pair(path, shape[0], shape[1], seed=seed)
        else:
            count, width, out = shape
            parameters.add(".".join(path.split(".")[-2:]))
            path = path.rpartition(".")[0]
            factors = pair(path, out, width, 4 * count, seed)
        tensors |= {key: value * np.float32(size) for key, value in factors.items()}
    config: dict[str, Any] = {"target_modules": sorted(modules)}
    if parameters:
        config |= {"target_parameters": sorted(parameters)}
    return write_adapter(folder, tensors, config)
