"""Files made by hand, byte by byte where it matters, and looks at what a run left on the disk."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_adapter
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import FileError, LoraToolError

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


def small_state(size: int = 8, dtype: torch.dtype = torch.float32) -> State:
    """The tensors of a small base; the first is the one that `lora_on` adapts."""
    return {
        ADAPTED: random_of(dtype, size, size, seed=1),
        OTHER: random_of(dtype, size, size, seed=2),
        NORM: random_of(dtype, size, seed=3),
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


def sha256s(folder: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def beside(output: Path) -> list[str]:
    """The hidden things that runs for `output` left beside it."""
    return sorted(p.name for p in output.parent.iterdir() if ".loratool-" in p.name)


def assert_clean(output: Path) -> None:
    """Nothing exists at `output`, and no leftovers beside it."""
    assert not os.path.lexists(output)
    assert beside(output) == []


def assert_clear(error: LoraToolError, *parts: str) -> None:
    """The message names all `parts`, is short, can be printed, and says what to do next."""
    for part in parts:
        assert part in error.message
    assert len(error.message) < 1500
    assert error.hint
    f"{error.message}{error.hint}".encode()


def refused(
    kind: type[LoraToolError], base: Path, adapter: Path, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Merge, expecting this error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, output, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value


def file_error(run: Any, path: Path, *parts: str) -> FileError:
    """Call `run(path)`, expecting a clear FileError that names the file and `parts`."""
    with pytest.raises(FileError) as caught:
        run(path)
    assert_clear(caught.value, str(path), *parts)
    return caught.value


# --- merges in processes of their own -----------------------------------------------------------

#: Runs one merge; prints the error as JSON. PRELUDE runs first, with `options` to change.
_CHILD = """
import json, os, sys, time
import loratool, loratool.merging.executor
base, adapter, output, options, prelude = json.loads(sys.argv[1])
exec(prelude)
try:
    loratool.merge(base, adapter, output, **options)
except loratool.LoraToolError as error:
    print(json.dumps({"kind": type(error).__name__, **error.to_dict()}), flush=True)
    sys.exit(error.exit_code)
"""


def start_merge(
    base: Path,
    adapter: Path,
    output: Path,
    prelude: str = "",
    env: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a merge in a process of its own."""
    arguments = json.dumps([str(base), str(adapter), str(output), options, prelude])
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def child_merge(*arguments: Any, **options: Any) -> tuple[int, dict[str, str], str]:
    """Run a merge in a process of its own: exit code, the error it met, stderr."""
    process = start_merge(*arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, json.loads(out) if out.strip() else {}, err


@contextmanager
def permissions_that_count() -> Iterator[None]:
    """Take the right away from root, for a while, to pass over file permissions."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    who = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread and those it starts
    held, lowered = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc.capget(who, held)
    libc.capget(who, lowered)
    lowered[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective set
    if libc.capset(who, lowered):
        # Root reads every file, so there is no file here that may not be read. CI can lower them.
        assert "CI" not in os.environ
        pytest.skip("running as root, and its rights cannot be lowered")
    try:
        yield
    finally:
        libc.capset(who, held)
