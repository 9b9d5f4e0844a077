"""What an adapter adds to a weight: a product of small factors, and the shape of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_float32

Kind = Literal["linear", "embedding", "conv", "attention-in", "attention-out"]


Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModuleShape:
    """A module as far as the names and shapes of its factors go.

    `out` are the rows of B and `inner` the dimensions of A beside the rank: `(in,)`, and for
    convolutions `(in, *kernel)`.
    """

    path: str
    kind: Kind
    out: int
    inner: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product B·A, convolution kernels flattened into `in`."""
        return self.out, math.prod(self.inner)


@dataclass(frozen=True)
class LowRank:
    """One adapted module: `ΔW = scale · B·A`.

    `a` and `b` are stored as PEFT stores them: `A [r, in]`, `B [out, r]` for linear layers;
    `A [r, in, *kernel]`, `B [out, r, 1, …]` for convolutions; `A [r, vocab]`, `B [dim, r]` for
    embeddings, whose delta is `(B·A)ᵀ`. With `blocks_a` or `blocks_b` above one the factor is
    block-diagonal (BD-LoRA) and stored as its blocks one above the other.

    `scale` is what the product is multiplied with in PEFT's forward pass: α/r, or α/√r for rsLoRA.
    The output projection of `nn.MultiheadAttention` ("attention-out") gets twice that, because
    PEFT's forward pass, and so its training, applies it twice. None where no config tells alpha.
    """

    path: str
    kind: Kind
    a: TensorInfo
    b: TensorInfo
    alpha: float | None
    scale: float | None
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    blocks_a: int = 1
    blocks_b: int = 1

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a.shape else 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product B·A, convolution kernels flattened into `in`."""
        out = self.b.shape[0] if self.b.shape else 0
        return out, math.prod(self.a.shape[1:]) * self.blocks_a

    @property
    def place(self) -> ModuleShape:
        out, width = self.shape
        inner = self.a.shape[1:] if self.blocks_a == 1 else (width,)
        return ModuleShape(self.path, self.kind, out, inner)

    @property
    def weight_name(self) -> str:
        """The tensor of the model that the delta is added to."""
        leaf = "in_proj_weight" if self.kind == "attention-in" else "weight"
        return f"{self.path}.{leaf}"

    @property
    def tensors(self) -> list[TensorInfo]:
        return [t for t in (self.a, self.b, self.magnitude, self.bias) if t is not None]

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    def factors(self, files: FilePool | None = None) -> tuple[Matrix, Matrix]:
        """`(B [out, r], A [r, in])` as float32 matrices, blocks put on their diagonal."""
        a = read_float32(self.a, files).reshape(self.rank, -1)
        b = read_float32(self.b, files).reshape(self.b.shape[0], -1)
        if self.blocks_a > 1:
            a = block_diagonal(a, self.blocks_a)
        if self.blocks_b > 1:
            b = block_diagonal(b, self.blocks_b)
        return b, a


def block_diagonal(stacked: Matrix, count: int) -> Matrix:
    """`[n, m]` holding `count` blocks one above the other -> `[n, m·count]` block-diagonal."""
    rows, width = stacked.shape[0] // count, stacked.shape[1]
    out = np.zeros((stacked.shape[0], width * count), np.float32)
    for i in range(count):
        part = slice(i * rows, (i + 1) * rows)
        out[part, i * width : (i + 1) * width] = stacked[part]
    return out
