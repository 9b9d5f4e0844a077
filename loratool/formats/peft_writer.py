"""Write a PEFT adapter: adapter_model.safetensors and adapter_config.json.

Ranks may be known only when the last module has been computed, and the header of a safetensors file
comes first. So factors are kept in a scratch file in the output's own folder until then; memory
holds one module.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapter import Adapter, LowRank
from loratool.checkpoint.header import build_header
from loratool.checkpoint.tensors import DTYPE_BITS, as_bytes
from loratool.checkpoint.writer import ShardWriter
from loratool.errors import ValueRangeError
from loratool.formats.peft import plain_path
from loratool.formats.peft_config import string_list
from loratool.threads import computed

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_SCRATCH = "factors.partial"

Bytes = npt.NDArray[np.uint8]

#: What is not below this becomes infinite.
_LARGEST = {"F16": 65520.0, "BF16": 3.3961775e38, "F32": 3.4028235e38}
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Extra:
    """A tensor beside the factors; `read` gives its bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes]


@dataclass(frozen=True)
class _Kept:
    """Where the factors of a module lie in the scratch file, `rank` columns and rows of them."""

    module: LowRank
    rank: int
    start: int


def encode(module: LowRank, b: npt.NDArray[Any], a: npt.NDArray[Any], dtype: str) -> Bytes:
    """The bytes of `a [k, in]` and of `bᵀ [k, out]`, so that ranks are runs of rows in both.

    Raises ValueRangeError if a value is too large for the dtype.
    """
    parts = []
    for half, values in (("A", a), ("B", b.T)):
        raw = as_bytes(values, dtype)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest < _LARGEST[dtype]:
            raise ValueRangeError(
                f"{module.path}: lora_{half} has values up to {largest:.3g}, too large for "
                f"{dtype}.",
                "Write it in a wider dtype: --dtype float32.",
            )
        parts.append(raw)
    return np.concatenate(parts)


class AdapterWriter:
    """Takes the factors of one module after the other, then writes the file. Use with `with`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder = folder
        self._dtype = dtype
        self._kept: list[_Kept] = []
        self._position = 0

    def __enter__(self) -> AdapterWriter:
        self._scratch = io.FileIO(self._folder / _SCRATCH, "x+")
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()
        (self._folder / _SCRATCH).unlink(missing_ok=True)

    def add(self, module: LowRank, rank: int, data: Bytes) -> None:
        """Keep the `encode`d factors of a module that is named and shaped like `module`."""
        self._kept.append(_Kept(module, rank, self._position))
        self._position += data.nbytes
        rest = data.data
        while rest:
            rest = rest[self._scratch.write(rest) :]

    def finish(self, ranks: Sequence[int], extras: Sequence[Extra], threads: int | None) -> int:
        """Write the file, each module with its rank: cut, or filled up with zeros. Its size."""
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        producers: list[Callable[[], Bytes]] = []
        for kept, rank in zip(self._kept, ranks, strict=True):
            shapes = factor_shapes(kept.module, rank)
            for half, (key, shape) in zip("AB", shapes, strict=True):
                tensors.append((key, self._dtype, shape))
                producers.append(partial(self._read, kept, half, rank))
        for extra in extras:
            tensors.append((extra.key, extra.dtype, extra.shape))
            producers.append(extra.read)
        file = ShardWriter(self._folder / WEIGHTS, build_header(tensors, {"format": "pt"}))
        try:
            position = 0
            for data in computed(producers, threads):
                file.write(position, data.data)
                position += data.nbytes
        finally:
            file.close()
        return file.data_start + position

    def _read(self, kept: _Kept, half: str, rank: int) -> Bytes:
        """The bytes of one factor at this rank, in the layout of PEFT."""
        out, width = kept.module.shape
        size = DTYPE_BITS[self._dtype] // 8
        length, start = (width, 0) if half == "A" else (out, kept.rank * width)
        rows = np.zeros((rank, length * size), np.uint8)
        target = rows[: min(rank, kept.rank)].data.cast("B") if kept.rank else memoryview(b"")
        position = kept.start + start * size
        while target:
            count = os.preadv(self._scratch.fileno(), [target], position)
            target, position = target[count:], position + count
        if half == "A":
            return rows.reshape(-1)
        elements = rows.view(_UNSIGNED[size]).T  # kept as [k, out], written as [out, k]
        return np.ascontiguousarray(elements).reshape(-1).view(np.uint8)


def factor_shapes(
    module: LowRank, rank: int
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """The keys and shapes of lora_A and lora_B of a module at this rank."""
    out, width = module.shape
    path = _PREFIX + _stored_path(module)
    if module.kind == "embedding":
        return (f"{path}.lora_embedding_A", (rank, width)), (
            f"{path}.lora_embedding_B", (out, rank),
        )  # fmt: skip
    inner = module.a.shape[1:] if module.blocks_a == 1 else (width,)
    ones = (1,) * (len(inner) - 1)
    return (f"{path}.lora_A.weight", (rank, *inner)), (f"{path}.lora_B.weight", (out, rank, *ones))


def _stored_path(module: LowRank) -> str:
    if module.kind == "attention-out":
        return f"{module.path.removesuffix('.out_proj')}.base_layer.out_proj"
    return module.path


def bias_key(module: LowRank) -> str:
    return f"{_PREFIX}{module.path}.lora_B.bias"


def magnitude_key(module: LowRank) -> str:
    return f"{_PREFIX}{module.path}.lora_magnitude_vector"


def saved_key(name: str, key: str, modules: dict[str, Any]) -> str:
    """The key of a tensor `name` that replaces one of the base, and was called `key` in its file.

    The original of an adapted module is called `base_layer`; there it is the one to replace.
    """
    owner, _, leaf = name.rpartition(".")
    if owner in modules:
        return f"{_PREFIX}{owner}.base_layer.{leaf}"
    plain = plain_path(key)
    kept = ".token_adapter.base_layer." in plain
    return _PREFIX + (plain if kept else name)


def rows_key(key: str) -> str:
    return _PREFIX + plain_path(key).removesuffix(".default")


def adapter_config(
    adapters: Sequence[Adapter],
    modules: Sequence[LowRank],
    ranks: Sequence[int],
    saved: Sequence[str],
    rows: dict[str, tuple[int, ...]],
    uniform: bool,
    biased: bool,
) -> dict[str, Any]:
    """adapter_config.json of an adapter with these modules, whose factors hold all of the scale.

    `alpha = r`, so that the scale is 1 for every module, also for programs that do not read the
    patterns, which are there only if not `uniform`.
    """
    configs = [a.config for a in adapters]
    rank = max(ranks)
    has_bias = any(name.endswith(".bias") for name in saved)
    biases = {str(c.get("bias") or "none") for c in configs}
    patterns = {m.path: r for m, r in zip(modules, ranks, strict=True) if r != rank and not uniform}
    # PEFT takes the first key that matches the end of a path, so the longest comes first.
    ordered = dict(sorted(patterns.items(), key=lambda item: (-len(item[0]), item[0])))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _common(configs, "task_type"),
        "base_model_name_or_path": next(_values(configs, "base_model_name_or_path"), None),
        "revision": _common(configs, "revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": _targets(configs, modules),
        "modules_to_save": _saved_modules(configs, saved) or None,
        "bias": next((b for b in ("all", "lora_only") if has_bias and b in biases), "none"),
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in configs),
        "use_dora": any(m.magnitude is not None for m in modules),
        "rank_pattern": ordered,
        "alpha_pattern": dict(ordered),
        "init_lora_weights": True,
    }
    if biased:
        config["lora_bias"] = True
    if any(c.get("ensure_weight_tying") for c in configs):
        config["ensure_weight_tying"] = True
    if rows:
        config["trainable_token_indices"] = {path: list(tokens) for path, tokens in rows.items()}
    return config


def _values(configs: Sequence[dict[str, Any]], field: str) -> Iterator[Any]:
    return (c[field] for c in configs if c.get(field))


def _common(configs: Sequence[dict[str, Any]], field: str) -> Any:
    """The value that all adapters have, else None."""
    found = {str(c.get(field)) for c in configs}
    return configs[0].get(field) if len(found) == 1 else None


def _targets(configs: Sequence[dict[str, Any]], modules: Sequence[LowRank]) -> list[str]:
    """Names that select exactly these modules in the base.

    Ends of names, as people write them, if that is how all the adapters were made; full paths where
    one was made with a regular expression or for some layers only.
    """
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    plain = all(
        isinstance(c.get("target_modules"), list)
        and not any(c.get(f) not in (None, []) for f in narrowed)
        for c in configs
    )
    paths = [m.path for m in modules if m.kind != "attention-out"]
    if plain:
        named = sorted({str(t) for c in configs for t in c["target_modules"]})
        used = [t for t in named if any(p == t or p.endswith(f".{t}") for p in paths)]
        if all(any(p == t or p.endswith(f".{t}") for t in used) for p in paths):
            return used
    return sorted(paths)


def _saved_modules(configs: Sequence[dict[str, Any]], saved: Sequence[str]) -> list[str]:
    named = {s for c in configs for s in string_list(c, "modules_to_save")}
    return sorted(s for s in named if any(f".{s}." in f".{name}" for name in saved))
