"""What a prediction misses, sparsely coded: where it is wrong, and by how many steps.

Floats are taken as integers in the order of their values, so that the distance of two neighbours is
1, across zero too, and every bit pattern has its place: -0, subnormals, infinities, NaN payloads.
Distances wrap around, so any value can be reached from any other.

A chunk holds the gaps between wrong elements (one byte each; 255 stands for 255 elements more) and
the distances (zigzag, in planes of bytes), both compressed with zstd. An empty chunk says that the
prediction was right everywhere.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import zstandard

from loratool.storage.tensors import Bytes

Positions = npt.NDArray[np.int64]
#: Signed integers as wide as the elements.
Distances = npt.NDArray[np.signedinteger]

_LEVEL = 3  # higher levels gain less than 2 % on such data and take many times longer
_HEAD = struct.Struct("<IBI")  # wrong elements, bytes of a distance, bytes of the coded gaps


class DamagedChunk(Exception):
    """A chunk or a compressed block that cannot be what was written."""


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(data)


def decompress(data: bytes, limit: int) -> bytes:
    """Raises DamagedChunk if `data` does not hold at most `limit` bytes."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= limit:
            raise DamagedChunk(f"{size} bytes announced, at most {limit} expected")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise DamagedChunk(str(error)) from None


def find(true: Bytes, predicted: Bytes, itemsize: int) -> tuple[Positions, Distances]:
    """Where the elements differ, and how far each true one is from the predicted one."""
    kind = np.dtype(f"i{itemsize}")
    wanted, given = true.view(kind), predicted.view(kind)
    positions = np.flatnonzero(wanted != given)
    return positions, ordered(wanted[positions]) - ordered(given[positions])


def apply(predicted: Bytes, positions: Positions, distances: Distances) -> None:
    """Move the elements at `positions` by `distances`, in place: the inverse of `find`."""
    values = predicted.view(distances.dtype)
    values[positions] = ordered(ordered(values[positions]) + distances)


def ordered(bits: Distances) -> Distances:
    """Bits of floats as integers in the order of the values; its own inverse."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def encode(positions: Positions, distances: Distances) -> bytes:
    """A chunk; `positions` count from its first element and grow."""
    if not positions.size:
        return b""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.max() < 255:
        coded = gaps.astype(np.uint8)
    else:
        long, rest = np.divmod(gaps, 255)
        coded = np.full(gaps.size + int(long.sum()), 255, np.uint8)
        coded[np.cumsum(long + 1) - 1] = rest
    bits = 8 * distances.itemsize
    zigzag = ((distances << 1) ^ (distances >> (bits - 1))).view(f"u{distances.itemsize}")
    top = int(zigzag.max())
    width = next(w for w in (1, 2, 4, 8) if top < 1 << 8 * w)
    planes = zigzag.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T
    coded_gaps = compress(coded.tobytes())
    return _HEAD.pack(positions.size, width, len(coded_gaps)) + coded_gaps + compress(
        planes.tobytes()
    )  # fmt: skip


def decode(chunk: bytes, elements: int, itemsize: int) -> tuple[Positions, Distances]:
    """The positions and distances of a chunk over `elements`. Raises DamagedChunk."""
    kind = np.dtype(f"i{itemsize}")
    if not chunk:
        return np.empty(0, np.int64), np.empty(0, kind)
    try:
        count, width, size = _HEAD.unpack_from(chunk)
    except struct.error as error:
        raise DamagedChunk(str(error)) from None
    if count > elements or width not in (1, 2, 4, 8) or width > itemsize:
        raise DamagedChunk(f"{count} distances of {width} bytes for {elements} elements")
    body = chunk[_HEAD.size :]
    coded = np.frombuffer(decompress(body[:size], 2 * elements), np.uint8)
    planes = np.frombuffer(decompress(body[size:], count * width), np.uint8)
    ends = np.flatnonzero(coded != 255)
    if ends.size != count or planes.size != count * width:
        raise DamagedChunk("its parts have different lengths")
    gaps = 255 * (np.diff(ends, prepend=-1) - 1) + coded[ends]
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= elements:
        raise DamagedChunk("a position lies behind its end")
    zigzag = np.ascontiguousarray(planes.reshape(width, -1).T).view(f"<u{width}").reshape(-1)
    wide = zigzag.astype(f"u{itemsize}")
    distances: Distances = ((wide >> 1) ^ (0 - (wide & 1))).view(kind)
    return positions.astype(np.int64), distances


def encode_whole(raw: Bytes, itemsize: int) -> bytes:
    """All elements themselves, in planes of bytes: exponents compress well, mantissas do not."""
    return compress(np.ascontiguousarray(raw.reshape(-1, itemsize).T).tobytes())


def decode_whole(chunk: bytes, elements: int, itemsize: int) -> Bytes:
    """The inverse of `encode_whole`. Raises DamagedChunk."""
    planes = np.frombuffer(decompress(chunk, elements * itemsize), np.uint8)
    if planes.size != elements * itemsize:
        raise DamagedChunk(f"{planes.size} bytes for {elements} elements")
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)
