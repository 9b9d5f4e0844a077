"""Distances between a prediction and the truth, coded sparsely in chunks."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.undoing import flipped, quick
from hypothesis import example, given
from hypothesis import strategies as st

from loratool.merging.undo import residual
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

SIZES = [1, 2, 4, 8]


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
