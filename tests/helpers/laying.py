"""Quantised checkpoints of single weights: written tensor by tensor, read whole and in cuts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from helpers.files import State
from helpers.outcomes import assert_clear
from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.storage.tensors import FilePool, as_float32
from loratool.storage.values import Values, values_of


def lay(
    folder: Path,
    tensors: State,
    table: Any = None,
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint of one file; `table` is its quantization_config."""
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
              metadata or {"format": "pt"})  # fmt: skip
    said = {} if table is None else {"quantization_config": table}
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    return folder


def opened(folder: Path) -> Dequantised:
    """A quantised checkpoint as the plain model that it stands for."""
    base = dequantised(open_checkpoint(folder))
    assert isinstance(base, Dequantised)
    return base


def whole(base: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """A weight as float32; pieces that end anywhere must be the same, bit for bit."""
    info = base.tensors[name]
    with FilePool() as files:
        values = values_of(info, files)
        raw = values.bytes(0, values.length)
        for step in (1, 37, *(rows * info.shape[-1] for rows in (1, 3, 40))):
            if values.length // step < 400:
                assert np.array_equal(_in_pieces(values, step), raw), step
    return as_float32(raw, info.dtype).reshape(info.shape)


def _in_pieces(values: Values, step: int) -> npt.NDArray[np.uint8]:
    lows = range(0, values.length, step)
    return np.concatenate([values.bytes(at, min(at + step, values.length)) for at in lows])


def same_bits(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float64]) -> bool:
    """Whether float32 values are those of float64 ones that float32 holds exactly."""
    assert np.array_equal(expected.astype(np.float32), expected)
    return np.array_equal(found.astype(np.float64), expected)


def refusal(folder: Path, *parts: str) -> BaseError:
    """Open a quantised checkpoint and read its weights, expecting a clear error with `parts`."""
    with pytest.raises(BaseError) as caught:
        _read_all(folder)
    assert_clear(caught.value, *parts)
    return caught.value


def _read_all(folder: Path) -> None:
    base = dequantised(open_checkpoint(folder))
    for name in base.tensors:
        whole(base, name)


def changed(tensors: State, changes: Mapping[str, Any]) -> State:
    """The same tensors with others in their place, by the last part of their names, or without
    those that are None."""
    found = dict(tensors)
    for role, value in changes.items():
        name = next((n for n in found if n.endswith(f".{role}")), f"m.{role}")
        found.pop(name, None)
        if value is not None:
            found[name] = value
    return found


def words_of(codes: npt.NDArray[np.int64], bits: int) -> torch.Tensor:
    """Rows of codes as 32-bit words, the first code lowest, one after the other without gaps:
    `[n, codes]` -> `[n, words]` int32."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(number.to_bytes(4 * count, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows).copy())


def text(words: str) -> torch.Tensor:
    """A text as a tensor of bytes."""
    return torch.from_numpy(np.frombuffer(words.encode(), np.uint8).copy())
