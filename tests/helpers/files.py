"""Files made by hand, byte by byte where it matters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers.adapters import write_adapter
from loratool.storage.bounded import open_regular
from loratool.storage.stamps import stamp_of
from loratool.storage.tensors import TensorInfo
from loratool.storage.torchfile import parse_pickled

State = dict[str, torch.Tensor]

#: The tensor that the adapters of `lora_on` adapt.
ADAPTED = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
}  # fmt: skip

CODES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16",
    torch.int16: "I16", torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in row-major order, as they lie in a file."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_of(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of any dtype with values that tell its elements apart."""
    made = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=made).to(dtype)
    if dtype.is_complex:
        return torch.randn(*shape, 2, generator=made).view(torch.complex64).reshape(shape)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=made).bool()
    return torch.randint(0, 100, shape, generator=made).to(dtype)


def header_file(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"") -> Path:
    """A safetensors file with this header, right or wrong, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_base(
    folder: Path,
    *shards: State,
    config: dict[str, Any] | None = None,
    names: list[str] | None = None,
) -> Path:
    """A base directory with a config.json: one model.safetensors, or shards with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **(config or {})}))
    if len(shards) == 1 and names is None:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    count = len(shards)
    names = names or [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def small_state(size: int = 8, dtype: torch.dtype = torch.float32, seed: int = 1) -> State:
    """The tensors of a small base; the first is the one that `lora_on` adapts."""
    return {
        ADAPTED: random_of(dtype, size, size, seed=seed),
        OTHER: random_of(dtype, size, size, seed=seed + 1),
        NORM: random_of(dtype, size, seed=seed + 2),
    }


def lora_on(
    folder: Path,
    b: np.ndarray | torch.Tensor,
    a: np.ndarray | torch.Tensor,
    target: str = ADAPTED,
) -> Path:
    """An adapter that adds exactly B·A (scale 1) to the tensor `target`."""
    path = target.removesuffix(".weight")
    tensors = {
        f"base_model.model.{path}.lora_A.weight": np.asarray(a, np.float32),
        f"base_model.model.{path}.lora_B.weight": np.asarray(b, np.float32),
    }
    return write_adapter(folder, tensors, {"r": len(a), "lora_alpha": len(a)})


def small_lora(folder: Path, size: int = 8) -> Path:
    """An adapter with random factors for `small_state(size)`."""
    rng = np.random.default_rng(5)
    return lora_on(folder, rng.standard_normal((size, 2)), rng.standard_normal((2, size)))


def load(folder: Path) -> State:
    """All tensors of a written model, as the reference library reads them."""
    found: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def same(one: State, other: State) -> bool:
    """True if names, dtypes, shapes and all bits are equal."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and raw_bytes(one[n]) == raw_bytes(other[n])
        for n in one
    )


def read_pickled(path: Path) -> tuple[dict[str, TensorInfo], str]:
    """The tensors of a torch file, whatever its name ends with, and the kind of its top object."""
    with open_regular(path) as stream:
        return parse_pickled(path, stream, stamp_of(stream.fileno()))
