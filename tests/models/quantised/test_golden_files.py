"""Are quantised weights read as the libraries read them, bit for bit?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import NAMES, golden

from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.storage.tensors import FilePool
from loratool.storage.values import values_of

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_librarys(name: str, tmp_path: Path) -> None:
    """Every format, made by its own library: whole, by rows, and in cuts that end anywhere."""
    case = golden(name)
    base = dequantised(open_checkpoint(case.lay(tmp_path / "base")))
    assert isinstance(base, Dequantised)
    assert base.weights.keys() == case.expected.keys()
    for weight, expected in case.expected.items():
        info = base.tensors[weight]
        assert info.shape == tuple(expected.shape), weight
        with FilePool() as files:
            values = values_of(info, files)
            whole = values.bytes(0, values.length)
            width = info.shape[-1]
            for step in (width, 2 * width + 1, 37):
                cuts = range(0, values.length, step)
                parts = [values.bytes(low, min(low + step, values.length)) for low in cuts]
                assert np.array_equal(np.concatenate(parts), whole), (weight, step)
        found = torch.from_numpy(whole).view(DTYPES[info.dtype]).reshape(info.shape)
        assert torch.equal(found.to(expected.dtype), expected), weight


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_is_lost(name: str, tmp_path: Path) -> None:
    """What the plain model holds: the weights, and the tensors that were never quantised."""
    case = golden(name)
    base = dequantised(open_checkpoint(case.lay(tmp_path / "base")))
    parts = tuple({weight.removesuffix("weight") for weight in case.expected})
    plain = {name for name in case.stored if not name.startswith(parts) or name.endswith("bias")}
    assert base.tensors.keys() == plain | case.expected.keys()
