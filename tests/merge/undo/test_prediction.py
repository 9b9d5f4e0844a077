"""Products on a grid: sums that do not depend on their order."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratool.adapters.factors import LowRank
from loratool.linalg.reproducible import on_grid
from loratool.merging.match import Delta
from loratool.merging.products import ExactProduct
from loratool.models.layouts.place import Place
from loratool.storage.tensors import FilePool, TensorInfo

RANKS = [1, 2, 3, 7, 8, 16, 31, 32, 33, 100, 256, 512]


def random_factors(rank: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """`B [12, rank]` and `A [rank, 10]` in float32, of odd magnitudes."""
    rng = np.random.default_rng(rank)
    b = rng.standard_normal((12, rank)).astype(np.float32)
    a = rng.standard_normal((rank, 10)).astype(np.float32)
    if kind == "rows-unlike":  # each row and column has a grid of its own
        b *= np.float32(3.0) ** rng.integers(-30, 30, (12, 1)).astype(np.float32)
        a *= np.float32(7.0) ** rng.integers(-15, 15, (1, 10)).astype(np.float32)
    elif kind == "ranks-unlike":  # large and tiny terms in one sum
        b *= 10.0 ** rng.integers(-12, 6, (1, rank)).astype(np.float32)
    elif kind == "almost-two":  # rounds up to the next power of two, where sums are largest
        b, a = np.full_like(b, 2 - 2**-23), np.full_like(a, 2 - 2**-23)
    elif kind == "just-below":  # all bits set
        b = rng.uniform(0.99, 1, b.shape).astype(np.float32)
        a = rng.uniform(0.99, 1, a.shape).astype(np.float32)
    elif kind == "subnormal":
        b, a = b * np.float32(1e-38), a * np.float32(1e-40)
    elif kind == "zeros":
        b[::2] = 0
        a[:, ::3] = -0.0
    return b, a


KINDS = ["normal", "rows-unlike", "ranks-unlike", "almost-two", "just-below", "subnormal", "zeros"]


def product_of(
    b: np.ndarray, a: np.ndarray, scale: float = 1.0, transposed: bool = False
) -> ExactProduct:
    factors = SimpleNamespace(left_right=lambda files: (b, a))
    place = Place("w", transposed=transposed)
    delta: Any = SimpleNamespace(factors=factors, scale=scale, place=place, rows=None)
    stored = (a.shape[1], len(b)) if transposed else (len(b), a.shape[1])
    with FilePool() as files:
        return ExactProduct(delta, stored, files)


def rows_of(product: ExactProduct, first: int, last: int, work: torch.dtype) -> torch.Tensor:
    window = product.window(first, last)
    assert window is not None
    return product.product(window, work)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", RANKS)
def test_a_product_on_the_grid_is_the_same_in_every_order(rank: int, kind: str) -> None:
    """Sums in any order, in any parts, or without any rounding at all have the same bits."""
    product = product_of(*random_factors(rank, kind), scale=4 / 3)
    b, a = product.b.numpy(), product.a.numpy()
    wanted = rows_of(product, 0, 12, torch.float64).clone().numpy()
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(rank)
        assert_same_bits(b[:, order] @ a[order], wanted)
        forward = np.zeros_like(wanted)
        for k in order:  # one after the other, each rounded
            forward += b[:, k : k + 1] * a[k : k + 1]
        assert_same_bits(forward, wanted)
    for parts in (2, 3, 7):
        pieces = np.array_split(np.arange(rank), parts)
        assert_same_bits(sum(b[:, p] @ a[p] for p in reversed(pieces)), wanted)
    for i, j in ((0, 0), (5, 3), (11, 9)):
        exact = sum((Fraction(x) * Fraction(y) for x, y in zip(b[i], a[:, j], strict=True)))
        assert Fraction(float(wanted[i, j])) == exact


def assert_same_bits(found: Any, wanted: np.ndarray) -> None:
    # Adding +0 makes zeros alike: their sign may depend on the order, and no sum shows it.
    assert np.array_equal((found + 0.0).view(np.int64), (wanted + 0.0).view(np.int64))


@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("rank", RANKS)
def test_the_grid_is_as_fine_as_promised(rank: int, kind: str) -> None:
    """Each factor keeps (53 - log2 r)/2 bits below its largest value: 24 at rank 16."""
    b, a = random_factors(rank, kind)
    bits = math.floor((53 - math.ceil(math.log2(rank))) / 2)
    product = product_of(b, a, scale=4 / 3)
    for axis, found, factor in ((1, product.b, b * np.float64(4 / 3)), (0, product.a, a)):
        largest = np.abs(factor).max(axis=axis, keepdims=True).astype(np.float64)
        assert (np.abs(found.numpy() - factor) <= largest * 2.0**-bits).all()
    assert bits == 24 or rank != 16


def test_the_grid_holds_what_fits_it() -> None:
    """Values of few bits stay as they are, zeros included; a row of zeros has a grid too."""
    values = np.array([[1.5, -0.25, 0.0], [0.0, 0.0, 0.0], [3e-300, 1e-300, -2e-300]])
    assert np.array_equal(on_grid(values[:2], 24, axis=1), values[:2])
    assert np.allclose(on_grid(values, 24, axis=1), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_product_do_not_depend_on_their_block(transposed: bool) -> None:
    """Row by row, in blocks or at once: the same bits, and the transposed ones are transposed."""
    b, a = random_factors(16, "normal")
    product = product_of(b, a, 0.3, transposed)
    count = 10 if transposed else 12
    whole = rows_of(product, 0, count, torch.float32).clone()
    for size in (1, 3, 7):
        for low in range(0, count, size):
            part = rows_of(product, low, min(low + size, count), torch.float32)
            assert torch.equal(part, whole[low : low + size])
    exact = torch.from_numpy(0.3 * b.astype(np.float64) @ a.astype(np.float64))
    assert torch.allclose(whole.double(), exact.T if transposed else exact, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_the_sign_of_a_zero_product_does_not_depend_on_the_shape(rows: int, tmp_path: Path) -> None:
    """BLAS gives -0 or +0 for 0 times a negative number, by the matrix's shape; a restored base
    with a -0 in it would differ."""
    b, a = np.zeros((50, 1), np.float32), -np.ones((1, 60), np.float32)
    save_file({"b": torch.from_numpy(b), "a": torch.from_numpy(a)}, tmp_path / "f.safetensors")
    start = 8 + int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little")
    path = tmp_path / "f.safetensors"
    info_a = TensorInfo("a", "F32", (1, 60), path, start)
    info_b = TensorInfo("b", "F32", (50, 1), path, start + a.nbytes)
    module = LowRank("m", "linear", info_a, info_b, 1.0, 1.0)
    from loratool.storage.tensors import FilePool

    with FilePool() as files:
        product = ExactProduct(Delta(Place("m.weight"), module), (50, 60), files)
    window = product.window(0, rows)
    assert window is not None
    for work in (torch.float32, torch.float64):
        assert not torch.signbit(product.product(window, work)).any()
