"""How ggml, the library below llama.cpp, stores tensors: plain numbers, and blocks of codes.

A tensor in blocks is a `Packed` one: it has the shape and the float32 values that its blocks stand
for, and `values_of` computes them. Only Q8_0 is read, the one that adapters are written in; it is
exact, since a code of 8 bits times a float16 fits into a float32. Others are known by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loratool.errors import FileError
from loratool.storage.composed import Composed
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import Values, values_of


class BlockKind(NamedTuple):
    """So many values lie together in a block of so many bytes."""

    name: str
    values: int
    nbytes: int


#: Types of plain numbers, by ggml's number of them, and their codes here.
PLAIN = {
    0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip

#: Name, values and bytes of a block.
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

#: Types in blocks (ggml-common.h), by ggml's number of them.
BLOCKS = {number: BlockKind(*kind) for number, kind in _BLOCKS.items()}
_Q8 = BLOCKS[8]


@dataclass(frozen=True)
class Packed(Composed):
    """The values that the blocks in its only part, raw bytes, stand for."""

    kind: BlockKind = _Q8

    @property
    def run(self) -> int:
        return self.kind.values


def in_blocks(raw: TensorInfo, shape: tuple[int, ...], kind: BlockKind) -> TensorInfo:
    """The tensor whose blocks lie in `raw`, `[n]` U8."""
    return Packed(
        raw.name, "F32", shape, raw.file, raw.start, stamp=raw.stamp, parts=(raw,), kind=kind
    )


class _Q8Values(Values):
    """Blocks of a float16 scale and 32 signed codes."""

    def __init__(self, info: Packed, files: FilePool) -> None:
        super().__init__(info)
        self._raw = values_of(info.parts[0], files)

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        first, last = low // _Q8.values, -(-high // _Q8.values)
        blocks = self._raw.bytes(first * _Q8.nbytes, last * _Q8.nbytes).reshape(-1, _Q8.nbytes)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        with np.errstate(invalid="ignore"):  # an infinite scale and a code of zero
            values = blocks[:, 2:].view(np.int8) * scales
        start = low - first * _Q8.values
        raw.view(np.float32)[:] = values.reshape(-1)[start : start + high - low]


@values_of.register
def _(info: Packed, files: FilePool) -> Values:
    if info.kind != _Q8:
        raise FileError(
            f"{info.file}: tensor {info.name!r} is stored as {info.kind.name}, which is not read.",
            "Convert the adapter again as F32, F16, BF16 or Q8_0.",
        )
    return _Q8Values(info, files)
