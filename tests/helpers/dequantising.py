"""Quantised weights of a folder, read as the plain model has them, or refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.files import State, same
from helpers.outcomes import assert_clear
from loratool.errors import BaseError
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.storage.tensors import FilePool
from loratool.storage.values import values_of

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def lay(folder: Path, stored: State, settings: dict[str, Any] | None = None) -> Path:
    """A base of these tensors, with `settings` as its quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.clone() for name, value in stored.items()}, folder / "model.safetensors")
    return folder


def opened(folder: Path, stored: State, settings: dict[str, Any] | None = None) -> Dequantised:
    """The plain model that a base of these tensors stands for."""
    base = dequantised(open_checkpoint(lay(folder, stored, settings)))
    assert isinstance(base, Dequantised)
    return base


def values(base: Dequantised, name: str) -> torch.Tensor:
    """A weight, in its own dtype. Read whole, by rows, and in cuts that end anywhere it is one."""
    info = base.tensors[name]
    with FilePool() as files:
        source = values_of(info, files)
        whole = source.bytes(0, source.length)
        columns = info.shape[-1]
        for step in {columns, 2 * columns + 1, 37 if source.length < 10_000 else 4099}:
            cuts = range(0, source.length, step)
            parts = [source.bytes(low, min(low + step, source.length)) for low in cuts]
            assert np.array_equal(np.concatenate(parts), whole), (name, step)
    return torch.from_numpy(whole).view(_DTYPES[info.dtype]).reshape(info.shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, zeros with their signs."""
    return same({"": one}, {"": other})


def _read_all(folder: Path, stored: State, settings: Any) -> None:
    base = opened(folder, stored, settings)
    for name in base.weights:
        values(base, name)


def unreadable(folder: Path, stored: State, settings: Any, *parts: str) -> BaseError:
    """Open a base and read its weights, expecting a clear BaseError with `parts` in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BaseError) as caught:
            _read_all(folder, stored, settings)
    assert_clear(caught.value, *parts)
    return caught.value
