"""What a prediction misses, coded sparsely; the undo file around it, whole and damaged; and that a
prediction comes out the same however its sums are taken."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_adapter
from files import (
    ADAPTED,
    NORM,
    OTHER,
    State,
    assert_clean,
    assert_clear,
    load,
    lora_on,
    random_of,
    raw_bytes,
    sha256s,
    small_lora,
    small_state,
    write_base,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError, LoraToolError, ValueRangeError
from loratool.merging.products import ExactProduct, on_grid
from loratool.merging.undo import residual
from loratool.merging.undo.file import UndoWriter, read_undo
from loratool.merging.undo.residual import (
    DamagedChunk,
    apply,
    compress,
    decode,
    decode_whole,
    decompress,
    encode,
    encode_whole,
    find,
)
from loratool.models.layouts.place import Place
from loratool.storage.header import build_header, read_header
from loratool.storage.tensors import FilePool

#: In a merged model.
UNDO = Path("loratool") / "undo.safetensors"
SIZES = [1, 2, 4, 8]
TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- distances -----------------------------------------------------------------------------------


def extremes(itemsize: int) -> np.ndarray:
    """Bit patterns at all the edges of a signed integer, which are all the edges of a float."""
    kind = np.iinfo(f"i{itemsize}")
    edges = [0, 1, 2, kind.max, kind.max - 1, kind.min, kind.min + 1, -1, -2]
    if itemsize in (2, 4, 8):
        infinity = int(np.array(np.inf, f"f{itemsize}").view(f"i{itemsize}"))
        edges += [infinity - 1, infinity, infinity + 1, kind.min + infinity]
    return np.array(sorted(set(edges)), f"i{itemsize}")


@pytest.mark.parametrize("itemsize", SIZES)
def test_every_bit_pattern_is_reached_from_every_other(itemsize: int) -> None:
    """Zeros of both signs, subnormals, infinities and NaN payloads: what `find` takes apart,
    `apply` puts together."""
    edges = extremes(itemsize)
    true, predicted = (a.reshape(-1) for a in np.meshgrid(edges, edges))
    true = np.ascontiguousarray(true)
    moved = np.ascontiguousarray(predicted).view(np.uint8)
    positions, distances = find(true.view(np.uint8), moved, itemsize)
    assert positions.size == edges.size * (edges.size - 1)
    apply(moved, positions, distances)
    assert np.array_equal(moved, true.view(np.uint8))


def test_all_pairs_of_neighbouring_halves_are_one_step_apart() -> None:
    """The next larger float16 is one step away, everywhere, from -0 to 0 too: so a prediction
    that misses by one rounding costs one bit."""
    finite = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    order = np.lexsort((~np.signbit(finite), finite))  # -0 before 0
    ordered = np.ascontiguousarray(finite[order])
    positions, distances = find(ordered[1:].view(np.uint8), ordered[:-1].view(np.uint8), 2)
    assert positions.size == 2 * 0x7C00 - 1
    assert (distances == 1).all()


def test_equal_elements_have_no_distance() -> None:
    """Only what differs in its bits is found: NaN equals itself, -0 is not 0."""
    true = np.array([np.nan, -0.0, 1.0], np.float32).view(np.uint8)
    predicted = np.array([np.nan, 0.0, 1.0], np.float32).view(np.uint8)
    positions, distances = find(true, predicted, 4)
    assert positions.tolist() == [1]
    assert distances.tolist() == [-1]


# --- chunks --------------------------------------------------------------------------------------

#: Positions, by the gaps between them; a gap of 255 elements needs a second byte.
GAPS: dict[str, list[int]] = {
    "first-element": [0],
    "adjacent": [0, 0, 0, 0],
    "254": [254, 254],
    "255": [255],
    "256": [256, 0, 256],
    "509-510-511": [509, 510, 511],
    "long": [0, 100_000, 3, 70_000],
    "long-first": [1_000_000],
}


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("gaps", GAPS)
def test_a_chunk_gives_back_its_positions_and_distances(gaps: str, itemsize: int) -> None:
    """Gaps of every length and distances of every size survive, up to the last element."""
    positions = np.cumsum(np.array(GAPS[gaps]) + 1) - 1
    limits = np.iinfo(f"i{itemsize}")
    for kinds in ([1, -1], [127, -128], [limits.max, limits.min, 1], [limits.min]):
        distances = np.resize(np.array(kinds, f"i{itemsize}"), positions.size)
        chunk = encode(positions, distances)
        elements = int(positions[-1]) + 1
        found, steps = decode(chunk, elements, itemsize)
        assert found.tolist() == positions.tolist()
        assert steps.dtype == distances.dtype
        assert steps.tolist() == distances.tolist()
        with pytest.raises(DamagedChunk):
            decode(chunk, elements - 1, itemsize)


def test_nothing_to_correct_is_an_empty_chunk() -> None:
    """A prediction that is right everywhere costs no byte."""
    nothing = np.empty(0, np.int64), np.empty(0, np.int16)
    assert encode(*nothing) == b""
    positions, distances = decode(b"", 1000, 2)
    assert (positions.size, distances.size, distances.dtype) == (0, 0, np.int16)


def test_sparse_corrections_are_small() -> None:
    """One step in a hundred elements costs about a byte each, not a position and a value."""
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(1 << 20) < 0.01)
    distances = rng.choice(np.array([-1, 1], np.int16), positions.size)
    assert len(encode(positions, distances)) < 1.3 * positions.size


@quick
@given(
    seed=st.integers(0, 2**32),
    itemsize=st.sampled_from(SIZES),
    elements=st.integers(1, 5000),
    density=st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]),
    reach=st.sampled_from([1, 100, 40_000, 2**62]),
)
def test_any_prediction_is_corrected(
    seed: int, itemsize: int, elements: int, density: float, reach: int
) -> None:
    """Whatever was predicted, find, encode, decode and apply give the true bytes."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 256, elements * itemsize, np.uint8)
    predicted = true.copy()
    values = predicted.view(f"i{itemsize}")
    wrong = rng.random(elements) < density
    values[wrong] += rng.integers(-reach, reach + 1, int(wrong.sum())).astype(f"i{itemsize}")
    chunk = encode(*find(true, predicted, itemsize))
    apply(predicted, *decode(chunk, elements, itemsize))
    assert np.array_equal(predicted, true)


def sample_chunk(itemsize: int = 4) -> tuple[bytes, int]:
    """A chunk with short and long gaps, and the number of elements it covers."""
    rng = np.random.default_rng(1)
    positions = np.cumsum(np.append(rng.integers(1, 20, 60), [700, 5, 300]))
    distances = rng.integers(-500, 500, positions.size).astype(f"i{itemsize}")
    return encode(positions, distances), int(positions[-1]) + 10


def test_a_damaged_chunk_is_noticed() -> None:
    """No single flipped bit and no missing byte gives other corrections than those written."""
    chunk, elements = sample_chunk()
    positions, distances = decode(chunk, elements, 4)
    damaged = [chunk[:n] for n in range(1, len(chunk))]
    for place in range(len(chunk)):
        damaged += [flipped(chunk, place, bit) for bit in range(8)]
    noticed = 0
    for other in damaged:
        try:
            found, steps = decode(other, elements, 4)
        except DamagedChunk:
            noticed += 1
        else:
            assert np.array_equal(found, positions)
            assert np.array_equal(steps, distances)
    assert noticed > 0.95 * len(damaged)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@quick
@given(chunk=st.binary(min_size=1, max_size=60), itemsize=st.sampled_from(SIZES))
@example(chunk=b"\x00" * 9, itemsize=2)
@example(chunk=b"\xff" * 60, itemsize=8)
def test_bytes_that_are_no_chunk_are_refused(chunk: bytes, itemsize: int) -> None:
    """Any bytes are a DamagedChunk, never another exception."""
    with pytest.raises(DamagedChunk):
        decode(chunk, 100, itemsize)


@pytest.mark.parametrize(
    ("count", "width", "gaps", "planes"),
    [
        (3, 1, b"\0\0", b"\2\2\2"),  # fewer positions than announced
        (3, 1, b"\0\0\0\0", b"\2\2\2"),  # more
        (2, 1, b"\0\0", b"\2\2\2"),  # more distances
        (2, 2, b"\0\0", b"\2\2\2"),  # not whole planes
        (2, 3, b"\0\0", b"\2" * 6),  # a width that is none
        (2, 8, b"\0\0", b"\2" * 16),  # wider than the element
        (2, 0, b"\0\0", b""),
        (2, 1, b"\0\xff", b"\2\2"),  # ends within a gap
        (2, 1, b"\0\xff\xfe", b"\2\2"),  # lies behind the end
        (101, 1, b"\0" * 101, b"\2" * 101),  # more than there are elements
        (2**32 - 1, 1, b"\0\0", b"\2\2"),
    ],
)
def test_a_chunk_that_contradicts_itself_is_refused(
    count: int, width: int, gaps: bytes, planes: bytes
) -> None:
    """Well compressed nonsense is refused as well."""
    coded = compress(gaps)
    head = residual._HEAD.pack(count, width, len(coded))
    with pytest.raises(DamagedChunk):
        decode(head + coded + compress(planes), 100, 4)


@pytest.mark.parametrize("itemsize", SIZES)
def test_a_whole_tensor_comes_back(itemsize: int) -> None:
    """Elements stored themselves come back, from none to many; other lengths are refused."""
    for elements in (0, 1, 7, 1000):
        raw = np.random.default_rng(0).integers(0, 256, elements * itemsize, np.uint8)
        chunk = encode_whole(raw, itemsize)
        assert np.array_equal(decode_whole(chunk, elements, itemsize), raw)
        with pytest.raises(DamagedChunk):
            decode_whole(chunk, elements + 1, itemsize)
        if elements:
            with pytest.raises(DamagedChunk):
                decode_whole(chunk, elements - 1, itemsize)


def test_a_small_file_does_not_unpack_to_a_large_one() -> None:
    """The length is checked before anything is unpacked, and a frame without one is refused."""
    import zstandard

    with pytest.raises(DamagedChunk, match="at most 1000"):
        decompress(compress(bytes(10**7)), 1000)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(DamagedChunk):
        decompress(unsized, 1000)
    assert decompress(compress(bytes(1000)), 1000) == bytes(1000)


# --- sums that do not depend on their order ------------------------------------------------------

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
    delta: Any = SimpleNamespace(factors=factors, scale=scale, place=place)
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


# --- the undo file does not depend on how the work was divided ------------------------------------


def several_blocks(folder: Path) -> tuple[Path, list[Path]]:
    """A base of all float dtypes, and a plain and a DoRA adapter for it."""
    state = {
        ADAPTED: random_of(torch.bfloat16, 40, 24, seed=1),
        OTHER: random_of(torch.float32, 30, 24, seed=2),
        "model.double.weight": random_of(torch.float64, 20, 24, seed=3),
        "model.embed_tokens.weight": random_of(torch.float16, 50, 24, seed=4),
        NORM: random_of(torch.float32, 1001, seed=5),
        "model.ids": random_of(torch.int64, 300, seed=6),
    }
    base = write_base(folder / "base", state)
    names = [ADAPTED, OTHER, "model.double.weight"]
    rows = {name: state[name].shape[0] for name in names}
    rng = np.random.default_rng(7)
    adapters = []
    for kind in ("plain", "dora"):
        tensors = {}
        for name in names:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((3, 24)) * 0.1
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((rows[name], 3)) * 0.1
            if kind == "dora":
                tensors[f"{path}.lora_magnitude_vector"] = rng.uniform(1, 5, rows[name])
        path = "base_model.model.model.embed_tokens"
        tensors[f"{path}.lora_embedding_A"] = rng.standard_normal((3, 50)) * 0.1
        tensors[f"{path}.lora_embedding_B"] = rng.standard_normal((24, 3)) * 0.1
        if kind == "dora":
            tensors[f"{path}.lora_magnitude_vector"] = rng.uniform(1, 5, 24)
        single = {key: value.astype(np.float32) for key, value in tensors.items()}
        config = {"r": 3, "lora_alpha": 4, "use_dora": kind == "dora"}
        adapters.append(write_adapter(folder / kind, single, config))
    return base, adapters


def set_block_size(patch: pytest.MonkeyPatch, elements: int) -> None:
    patch.setattr("loratool.storage.tensors.BLOCK_ELEMENTS", elements)


def test_the_undo_file_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two or five workers write the same bytes, and any number of workers restores them."""
    set_block_size(monkeypatch, 64)
    base, adapters = several_blocks(tmp_path)
    written = []
    for threads in (1, 2, 5):
        out = tmp_path / f"out-{threads}"
        loratool.merge(base, adapters, out, reversible=True, threads=threads)
        written.append(sha256s(out))
        back = tmp_path / f"back-{threads}"
        loratool.unmerge(out, adapters, back, threads=6 - threads)
        assert sha256s(back) == sha256s(base)
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("recorded", [50, 600, 1 << 19])
def test_a_base_is_restored_in_blocks_of_any_size(
    recorded: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undo file written in blocks of one size is read in blocks of another."""
    base, adapters = several_blocks(tmp_path)
    set_block_size(monkeypatch, recorded)
    loratool.merge(base, adapters, tmp_path / "out", dtype=dtype, reversible=True)
    for restored in (24, 100, 777, 1 << 19):
        set_block_size(monkeypatch, restored)
        loratool.unmerge(tmp_path / "out", adapters, tmp_path / f"back-{restored}")
        assert sha256s(tmp_path / f"back-{restored}") == sha256s(base)


def multiply_backwards(b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product whose sums run from the last term to the first."""
    out.zero_()
    for k in reversed(range(a.shape[0])):
        out += b[:, k : k + 1] * a[k : k + 1]
    return out


def multiply_in_halves(b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product whose terms are shuffled and whose sums are taken in two parts."""
    made = torch.Generator().manual_seed(3)
    order = torch.randperm(a.shape[0], generator=made)
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    return out.copy_(b[:, one] @ a[one] + b[:, other] @ a[other])


@pytest.mark.parametrize("multiply", [multiply_backwards, multiply_in_halves])
@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_a_base_is_restored_with_another_product(
    dtype: str, multiply: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library for matrices that adds up in another order gives the base back all the same."""
    base = write_base(tmp_path / "base", small_state(64, TORCH[dtype]))
    rng = np.random.default_rng(1)
    lora = lora_on(tmp_path / "lora", rng.standard_normal((64, 37)), rng.standard_normal((37, 64)))
    loratool.merge(base, lora, tmp_path / "out", dtype="float32", reversible=True)
    called = []

    def product(b: torch.Tensor, a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        called.append(b.dtype)
        result: torch.Tensor = multiply(b, a, out)
        return result

    monkeypatch.setattr(torch, "mm", product)
    loratool.unmerge(tmp_path / "out", lora, tmp_path / "back")
    assert set(called) == {torch.float64}
    assert sha256s(tmp_path / "back") == sha256s(base)


# --- any base, any adapter -----------------------------------------------------------------------


@settings(quick, max_examples=80)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(1, 40),
    stored=st.sampled_from(sorted(TORCH)),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "base"]),
    size=st.integers(-9, 4),
    scale=st.integers(-12, 4),
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=3),
    dora=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(24, 1, 40, "F64", "float16", 4, 0, [0.0, -0.0], True, 0)
@example(1, 24, 1, "BF16", "bfloat16", -9, 4, [1.0], False, 1)
def test_any_base_comes_back(
    rows: int,
    columns: int,
    rank: int,
    stored: str,
    dtype: str,
    size: int,
    scale: int,
    weights: list[float],
    dora: bool,
    seed: int,
) -> None:
    """Whatever shapes, dtypes, sizes and weights: every file of the base is as it was."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int, power: int = 0) -> np.ndarray:
        return (rng.standard_normal(shape) * 10.0**power).astype(np.float32)

    path = f"base_model.model.{ADAPTED.removesuffix('.weight')}"
    state = {
        ADAPTED: torch.from_numpy(numbers(rows, columns, power=size)).to(TORCH[stored]),
        NORM: torch.from_numpy(numbers(columns, power=size)).to(TORCH[stored]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(folder / "base", state)
        adapters = []
        for i in range(len(weights)):
            tensors = {
                f"{path}.lora_A.weight": numbers(rank, columns),
                f"{path}.lora_B.weight": numbers(rows, rank, power=scale),
            }
            if dora:
                tensors[f"{path}.lora_magnitude_vector"] = np.abs(numbers(rows, power=size))
            config = {"r": rank, "lora_alpha": 3, "use_dora": dora}
            adapters.append(write_adapter(folder / f"lora-{i}", tensors, config))
        try:
            loratool.merge(
                base, adapters, folder / "out", weights=weights, dtype=dtype, reversible=True
            )
        except ValueRangeError:
            assume(False)
        loratool.unmerge(folder / "out", adapters, folder / "back")
        assert sha256s(folder / "back") == sha256s(base)


# --- the undo file, whole -------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base in two files, an adapter, and what a reversible merge made of them."""
    base = write_base(
        tmp_path / "base",
        {ADAPTED: random_of(torch.bfloat16, 8, 8), OTHER: random_of(torch.float32, 4)},
        {NORM: random_of(torch.float32, 8), "z.weight": random_of(torch.float32, 6, 5)},
    )
    # A header that nobody would write again by chance.
    second = base / "model-00002-of-00002.safetensors"
    save_file(load_one(second), second, metadata={"format": "pt", "origin": "a ship of Theseus"})
    lora = small_lora(tmp_path / "lora")
    replace_z(lora)
    for folder, text in ((base, "{}"), (lora, '{"trained": true}')):
        (folder / "tokenizer.json").write_text(text)
    loratool.merge(base, lora, tmp_path / "out", reversible=True)
    return base, lora, tmp_path / "out"


def load_one(path: Path) -> State:
    from safetensors.torch import load_file

    found: State = load_file(path)
    return found


def replace_z(lora: Path) -> None:
    """Let the adapter replace z.weight, too."""
    path = lora / "adapter_model.safetensors"
    saved = {"base_model.model.z.modules_to_save.default.weight": random_of(torch.float32, 6, 5)}
    save_file({**load_one(path), **saved}, path, {"format": "pt"})
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["z"]}))


def test_the_undo_file_is_a_safetensors_file(merged: tuple[Path, Path, Path]) -> None:
    """The reference library opens it, and the table of the base names every tensor with its
    dtype, shape and sha256."""
    import hashlib

    import safetensors

    base, _, out = merged
    with safetensors.safe_open(out / UNDO, "np") as opened:
        kinds = {key.partition(":")[0] for key in opened.keys()}  # noqa: SIM118
        table = json.loads(decompress(opened.get_tensor("base").tobytes(), 1 << 20))
    assert kinds == {"residual", "whole", "header", "file", "base"}
    for name, tensor in load(base).items():
        row = table["tensors"][name]
        assert row["shape"] == list(tensor.shape)
        assert row["sha256"] == hashlib.sha256(raw_bytes(tensor)).hexdigest()
        assert row["whole"] == (name == "z.weight")
    assert [s["file"] for s in table["shards"]] == sorted(p.name for p in base.glob("*.safe*s"))


def test_programs_that_load_the_model_do_not_see_the_undo_file(
    merged: tuple[Path, Path, Path],
) -> None:
    """Beside the weights lies no other safetensors file; the undo file is in a folder."""
    base, _, out = merged
    weights = sorted(p.name for p in out.glob("*.safetensors"))
    assert weights == sorted(p.name for p in base.glob("*.safetensors"))
    assert (out / UNDO).is_file()


def test_what_the_undo_file_says_is_checked_before_it_is_read(tmp_path: Path) -> None:
    """Entries may be empty or grow in pieces, and the writer's room for names is used or padded."""
    path = tmp_path / "undo.safetensors"
    writer = UndoWriter(path, [f"residual:{i}" for i in range(50)])
    writer.append("residual:3", b"")
    writer.append("residual:7", b"ab")
    writer.append("residual:7", b"cd")
    row = {"dtype": "F16", "shape": [9], "whole": False, "sha256": "", "gains": []}
    tensors = {"3": {**row, "step": 0, "sizes": []}, "7": {**row, "step": 9, "sizes": [4]}}
    shards = [{"file": "model.safetensors", "tensors": ["3", "7"]}]
    table: dict[str, Any] = {
        "tensors": tensors, "shards": shards, "side_files": {}, "files": {}, "headers": {},
    }  # fmt: skip
    assert writer.finish(table) == path.stat().st_size
    entries, _ = read_header(path)
    assert list(entries) == ["residual:7", "base"]
    assert entries["residual:7"].nbytes == 4
    assert read_undo(path).tensors.keys() == {"3", "7"}


# --- the undo file, damaged -----------------------------------------------------------------------


def right_or_refused(merged: tuple[Path, Path, Path], back: Path) -> LoraToolError | None:
    """Unmerge: the base comes back, or there is a clear error and no output."""
    base, lora, out = merged
    try:
        loratool.unmerge(out, lora, back)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
        return error
    assert sha256s(back) == sha256s(base)
    shutil.rmtree(back)
    return None


def test_any_flipped_bit_is_refused_or_harmless(
    merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Wherever a bit of the undo file flips, the base comes back right or not at all."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    padding = range(8 + len(header.rstrip()), 8 + len(header))
    places = [i for i in range(len(content)) if i not in padding]
    refused = 0
    tried = [*places[::4], padding[0], padding[-1]]
    for turn, place in enumerate(tried):
        undo.write_bytes(flipped(content, place, turn * 3 % 8))
        refused += right_or_refused(merged, tmp_path / "back") is not None
    assert refused > 0.8 * len(tried)
    undo.write_bytes(content)
    assert right_or_refused(merged, tmp_path / "back") is None


@pytest.mark.parametrize(
    "entry",
    ["residual:", "whole:", "header:", "file:config", "file:tokenizer", "file:model", '"base"'],
)
def test_an_entry_of_another_name_is_refused(
    entry: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """An entry that damage has renamed is missed: no file is left out or made up in its place."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    wrong = entry[:-1] + chr(ord(entry[-1]) ^ 1)
    assert entry.encode() in content
    undo.write_bytes(content.replace(entry.encode(), wrong.encode(), 1))
    error = right_or_refused(merged, tmp_path / "back")
    assert isinstance(error, FileError)


def test_a_truncated_undo_file_is_refused(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """However much of it is missing, or too much, the undo file is refused by name."""
    undo = merged[2] / UNDO
    content = undo.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(content), 97), len(content) - 1]:
        undo.write_bytes(content[:length])
        error = right_or_refused(merged, tmp_path / "back")
        assert isinstance(error, FileError)
        assert str(undo) in error.message
    undo.write_bytes(content + b"\0")
    assert isinstance(right_or_refused(merged, tmp_path / "back"), FileError)


@pytest.mark.parametrize("other", ["folder", "model", "adapter", "text"])
def test_something_else_in_the_place_of_the_undo_file_is_refused(
    other: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Weights, text or nothing readable where the undo file should be: an error, no traceback."""
    base, lora, out = merged
    undo = out / UNDO
    undo.unlink()
    if other == "folder":
        undo.mkdir()
        with pytest.raises(LoraToolError):
            loratool.unmerge(out, lora, tmp_path / "back")
        assert_clean(tmp_path / "back")
        return
    if other == "text":
        undo.write_text("see elsewhere")
    else:
        source = base if other == "model" else lora
        shutil.copy(next(iter(sorted(source.glob("*.safetensors")))), undo)
    error = right_or_refused(merged, tmp_path / "back")
    assert isinstance(error, FileError)
    assert str(undo) in error.message


def test_the_undo_file_of_another_merge_is_refused(
    merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """An undo file made for the same base with another adapter gives an error, not a wrong base."""
    base, _, out = merged
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(base, other, tmp_path / "elsewhere", reversible=True)
    shutil.copy(tmp_path / "elsewhere" / UNDO, out / UNDO)
    assert right_or_refused(merged, tmp_path / "back") is not None


Table = dict[str, Any]


def rewrite(
    undo: Path, change: Callable[[Table], Any], extra: dict[str, bytes] | None = None
) -> None:
    """Write an undo file again with another table of the base, and entries more."""
    entries, _ = read_header(undo)
    content = undo.read_bytes()
    data = {n: content[i.start : i.start + i.nbytes] for n, i in entries.items()}
    table = json.loads(decompress(data.pop("base"), 1 << 30))
    table = change(table) or table
    data |= extra or {}
    data["base"] = compress(json.dumps(table).encode())
    shapes = [(name, "U8", (len(value),)) for name, value in data.items()]
    undo.write_bytes(build_header(shapes, {"format": "loratool-undo"}) + b"".join(data.values()))


def first(table: Table) -> Table:
    row: Table = table["tensors"][ADAPTED]
    return row


#: Tables that no merge writes.
TABLES: dict[str, Callable[[Table], Any]] = {
    "a-list": lambda t: [t],
    "no-version": lambda t: t.pop("version") and None,
    "later-version": lambda t: t.update(version=2),
    "no-tensors": lambda t: t.pop("tensors") and None,
    "tensors-are-a-list": lambda t: t.update(tensors=list(t["tensors"])),
    "tensor-is-null": lambda t: t["tensors"].update({ADAPTED: None}),
    "tensor-missing": lambda t: t["tensors"].pop(ADAPTED) and None,
    "tensor-more": lambda t: t["tensors"].update({"new.weight": dict(first(t))}),
    "unknown-dtype": lambda t: first(t).update(dtype="F15"),
    "dtype-is-a-list": lambda t: first(t).update(dtype=["F32"]),
    "other-dtype": lambda t: first(t).update(dtype="F16"),
    "wider-dtype": lambda t: first(t).update(dtype="F32"),
    "other-shape": lambda t: first(t).update(shape=[4, 16]),
    "longer-shape": lambda t: first(t).update(shape=[80, 80]),
    "negative-shape": lambda t: first(t).update(shape=[-8, -8]),
    "shape-is-text": lambda t: first(t).update(shape="88"),
    "shape-of-floats": lambda t: first(t).update(shape=[8.0, 8.0]),
    "other-hash": lambda t: first(t).update(sha256="0" * 64),
    "hash-is-null": lambda t: first(t).update(sha256=None),
    "whole": lambda t: first(t).update(whole=True),
    "not-whole": lambda t: t["tensors"]["z.weight"].update(whole=False),
    "step-of-3": lambda t: t["tensors"][NORM].update(step=3),
    "step-is-negative": lambda t: t["tensors"][NORM].update(step=-4),
    "step-is-text": lambda t: t["tensors"][NORM].update(step="4"),
    "sizes-of-zero": lambda t: t["tensors"][NORM].update(sizes=[0]),
    "sizes-are-huge": lambda t: t["tensors"][NORM].update(sizes=[10**30]),
    "sizes-are-negative": lambda t: t["tensors"][NORM].update(sizes=[-1]),
    "sizes-are-text": lambda t: t["tensors"][NORM].update(sizes=["a"]),
    "no-shards": lambda t: t.pop("shards") and None,
    "shards-are-empty": lambda t: t.update(shards=[]),
    "shard-twice": lambda t: t["shards"].append(t["shards"][0]),
    "two-shards-of-one-name": lambda t: t["shards"][1].update(file=t["shards"][0]["file"]),
    "shard-without-tensors": lambda t: t["shards"].append({"file": "x", "tensors": []}),
    "shard-name-is-null": lambda t: t["shards"][0].update(file=None),
    "shard-name-is-empty": lambda t: t["shards"][0].update(file=""),
    "shard-name-is-a-folder": lambda t: t["shards"][0].update(file="."),
    "shard-name-with-a-zero": lambda t: t["shards"][0].update(file="a\0b"),
    "shard-name-is-the-config": lambda t: t["shards"][0].update(file="config.json"),
    "shard-elsewhere": lambda t: t["shards"][0].update(file="../escaped.safetensors"),
    "shard-at-the-root": lambda t: t["shards"][0].update(file="/escaped.safetensors"),
    "shard-order": lambda t: t["shards"][0]["tensors"].reverse(),
    "shards-of-a-list": lambda t: t["shards"][0].update(tensors=[[ADAPTED]]),
    "no-side-files": lambda t: t.pop("side_files") and None,
    "side-files-are-a-list": lambda t: t.update(side_files=["config.json"]),
    "side-file-elsewhere": lambda t: t["side_files"].update({"../escaped": "0" * 64}),
    "side-file-is-null": lambda t: t["side_files"].update({"config.json": None}),
    "side-file-missing": lambda t: t["side_files"].pop("config.json") and None,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_no_merge_writes_is_refused(
    name: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A made-up undo file cannot crash the run, write elsewhere, or pass for the base."""
    before = set(os.listdir(tmp_path.parent))
    rewrite(merged[2] / UNDO, TABLES[name])
    error = right_or_refused(merged, tmp_path / "back")
    if name == "later-version":
        assert "later loratool" in str(error)
    assert set(os.listdir(tmp_path.parent)) == before
    assert not list(tmp_path.rglob("*escaped*"))


ENTRIES: dict[str, bytes] = {
    "file:../escaped": compress(b"x"),
    "file:/escaped": compress(b"x"),
    "file:": compress(b"x"),
    "file:a\0b": compress(b"x"),
    "file:config.json": compress(b"[1, 2]"),
    "file:tokenizer.json": b"not compressed",
    "file:model-00001-of-00002.safetensors": compress(b"x"),
    "header:model-00001-of-00002.safetensors": compress(b"\x02\0\0\0\0\0\0\0{}"),
    "header:../escaped": compress(b"x"),
    "gain:" + ADAPTED + ":0": np.ones(8, np.float32).tobytes(),
    "gain:" + ADAPTED + ":0 ": b"abc",
    "residual:unheard": b"abc",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_no_merge_writes_is_refused_or_harmless(
    name: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Nor can a made-up entry."""
    before = set(os.listdir(tmp_path.parent))
    rewrite(merged[2] / UNDO, lambda table: None, {name: ENTRIES[name]})
    right_or_refused(merged, tmp_path / "back")
    assert set(os.listdir(tmp_path.parent)) == before
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("length", [0, 1, 3, 7, 28, 36])
def test_gains_of_another_length_are_refused(length: int, tmp_path: Path) -> None:
    """What DoRA multiplied with must be there for every row, no more and no less."""
    base, adapters = several_blocks(tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapters[1], out, reversible=True)
    gain = f"gain:{ADAPTED}:0"
    assert gain in read_header(out / UNDO)[0]
    rewrite(out / UNDO, lambda table: None, {gain: b"\x3f" * length})
    assert right_or_refused((base, adapters[1], out), tmp_path / "back") is not None
