"""Do the ends of quantised values enclose the numbers that the libraries made the values of?"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.golden import GOLDEN, NAMES, golden

from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.ends import ends_of, form_of, schemes_of
from loratool.storage.composed import joined, view
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_float32, values_of

#: Half a unit of bfloat16: what a library may compute in before it rounds.
BLUR = 2.0**-8

#: What the weights were drawn from that some golden files were made of.
DRAWN = {
    ("bnb-nf4-nested-many", "a.weight"): "a nf4 True",
    ("bnb-nf4-plain-fp16", "a.weight"): "a nf4 False",
    ("bnb-fp4-nested", "a.weight"): "a fp4 True",
    ("fp8-block-uneven", "a.weight"): "a (16, 16)",
    ("fp8-block-e8m0-bytes", "a.weight"): "a (16, 16)",
}  # fmt: skip


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(name: str, folder: Path) -> dict[str, TensorInfo]:
    base = dequantised(open_checkpoint(golden(name).lay(folder / "base")))
    return {n: info for n, info in base.tensors.items() if schemes_of(info)}


def read(info: TensorInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower ends, values, upper ends; without the ends that are no numbers."""
    pair = ends_of(info)
    assert pair is not None
    assert {end.shape for end in pair} == {info.shape}
    with FilePool() as files:
        low, value, high = (read_float32(t, files) for t in (pair[0], info, pair[1]))
    return open_where_nothing(low, -np.inf), value, open_where_nothing(high, np.inf)


def open_where_nothing(ends: np.ndarray, far: float) -> np.ndarray:
    return np.where(np.isnan(ends), far, ends).astype(np.float32)


def blurred(ends: np.ndarray) -> np.ndarray:
    return BLUR * np.abs(np.where(np.isfinite(ends), ends, 0))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_between_their_ends_in_any_cut(name: str, tmp_path: Path) -> None:
    """Of every format: the value is inside, near neither end where there are two, and ranges that
    end anywhere give the same."""
    for info in opened(name, tmp_path).values():
        low, value, high = read(info)
        assert (low <= value + blurred(value)).all()
        assert (value - blurred(value) <= high).all()
        both = np.isfinite(low) & np.isfinite(high)
        both[both] = (high > low)[both]
        places = (value - low)[both] / (high - low)[both]
        assert places.size < 32 or np.median(np.abs(places - 0.5)) < 0.2, info.name
        with FilePool() as files:
            pairs = zip(ends_of(info) or (), (low, high), (-np.inf, np.inf), strict=True)
            for end, whole, far in pairs:
                values = values_of(end, files)
                cuts = range(0, values.length, 37)
                parts = [values.floats(at, min(at + 37, values.length)) for at in cuts]
                found = open_where_nothing(np.concatenate(parts), far)
                assert np.array_equal(found, whole.reshape(-1))


@pytest.mark.parametrize(("name", "weight"), DRAWN)
def test_what_was_quantised_is_between_the_ends(name: str, weight: str, tmp_path: Path) -> None:
    """The library's own choice of codes: every number lies between the ends of the value that it
    became, and all over between them."""
    info = opened(name, tmp_path)[weight]
    dtype = torch.float16 if name.endswith("fp16") else torch.bfloat16
    made = maker().weight(*info.shape, DRAWN[name, weight], dtype).float().numpy()
    low, _, high = read(info)
    assert (made >= low - blurred(low)).all()
    assert (made <= high + blurred(high)).all()
    both = np.isfinite(low) & np.isfinite(high) & (made != 0)
    places = (made - low)[both] / (high - low)[both] - 0.5
    assert 12 * float(np.mean(places**2)) == pytest.approx(1, abs=0.2)


def test_what_is_put_together_has_ends_too(tmp_path: Path) -> None:
    """Views of quantised weights, and several one after the other, also beside a plain tensor."""
    (info,) = opened("bnb-nf4-nested-many", tmp_path).values()
    low, value, high = read(info)
    rows = view(info, (5, info.shape[1]), 7 * info.shape[1], None)
    turned = view(info, info.shape[::-1], 0, (1, info.shape[1]))
    both = joined("both", (5 + info.shape[0], info.shape[1]), [rows, info])
    for made, pick in ((rows, slice(7, 12)), (turned, ...), (both, ...)):
        found = read(made)
        expected = [side[pick] for side in (low, value, high)]
        if made is turned:
            expected = [side.T for side in expected]
        if made is both:
            expected = [np.concatenate([side[7:12], side]) for side in expected]
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
        assert form_of(made) == "NF4"
    plain = info.parts[0]  # type: ignore[attr-defined]
    assert ends_of(plain) is None
    assert form_of(plain) == "U8"
