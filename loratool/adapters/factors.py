"""What an adapter holds for one module: factors, whatever their kind, and what is asked of them.

`Factors` says what the rest of the house needs to know, from headers alone; numbers come from
`left_right` where there is a pair of low rank, and from `part_of` otherwise. `LowRank` is the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_float32

Kind = Literal["linear", "embedding", "conv", "attention-in", "attention-out", "experts"]


Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModuleShape:
    """A module by the names and shapes of its factors.

    `out` are the rows of B and `inner` the dimensions of A beside the rank: `(in,)`, and for
    convolutions `(in, *kernel)`.

    Of a stack ("experts") `path` is the name of the parameter, and there are factors of these
    shapes for each of `experts` matrices. `above` counts the parameters of its module that are
    adapted too and that the module registered later. Where it is `flat`, the weight may be that of
    a convolution, whose channels and kernel are one dimension here.
    """

    path: str
    kind: Kind
    out: int
    inner: tuple[int, ...]
    experts: int = 1
    above: int = 0
    flat: bool = False

    @property
    def owner(self) -> str:
        """The module that holds it."""
        return self.path.rpartition(".")[0] if self.kind == "experts" else self.path

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product B·A, convolution kernels flattened into `in`."""
        return self.out, math.prod(self.inner)

    @property
    def rank_owner(self) -> str:
        """The module that has the rank: the two parts of an attention module share one."""
        return self.path.removesuffix(".out_proj") if self.kind == "attention-out" else self.path


#: Rows of Δ by number, and a run of its columns.
Part = Callable[["slice | npt.NDArray[np.intp]", slice], Matrix]


class Factors(Protocol):
    """The trained change of one weight, `scale·Δ` with Δ `[out, in]`, as it lies in files.

    `kind` is the sort of layer, `alpha` and `scale` are None where no config tells them. Where
    `magnitude` is there (DoRA), what is computed from W + scale·Δ is scaled to it; `bias` is added
    to the layer's bias, times the scale.
    """

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def algorithm(self) -> str:
        """How Δ is made, by the name that its authors gave it: "LoRA", "DoRA", "LoHa"."""

    @property
    def alpha(self) -> float | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def scale_from(self) -> str:
        """Where the scale is from, for people: "config", "option", …; "" where there is none."""

    @property
    def magnitude(self) -> TensorInfo | None: ...
    @property
    def bias(self) -> TensorInfo | None: ...
    @property
    def outline(self) -> ModuleShape:
        """Its path, kind and dimensions."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of Δ, convolution kernels flattened into `in`."""

    @property
    def rank(self) -> int: ...
    @property
    def dtype(self) -> str:
        """The dtype that the factors are stored in."""

    @property
    def parts(self) -> dict[str, TensorInfo]:
        """The tensors that Δ is made of, by what people call them: "A", "B"."""

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors: the parts, magnitude and bias."""

    @property
    def parameters(self) -> int: ...
    @property
    def weight_name(self) -> str:
        """The tensor of the model that Δ is added to."""

    @property
    def is_sound(self) -> bool:
        """Whether the parts' shapes and dtypes make a Δ at all."""

    @property
    def adds(self) -> bool:
        """Whether the merged weight is W + scale·Δ whatever W is, so that such changes add up."""

    def left_right(self, files: FilePool | None = None) -> tuple[Matrix, Matrix] | None:
        """`(B [out, r], A [r, in])` in float32 with Δ = B·A; None where there is no such pair."""

    def part_of(self, files: FilePool) -> Part:
        """Loads what Δ is made of; the result gives Δ[rows, columns] in float32."""


@dataclass(frozen=True)
class LowRank:
    """A pair of factors: `Δ = B·A`.

    `a` and `b` are stored as PEFT stores them: `A [r, in]`, `B [out, r]` for linear layers;
    `A [r, in, *kernel]`, `B [out, r, 1, …]` for convolutions; `A [r, vocab]`, `B [dim, r]` for
    embeddings, whose delta is `(B·A)ᵀ`. With `blocks_a` or `blocks_b` above one the factor is
    block-diagonal (BD-LoRA) and stored as its blocks one above the other.

    `scale` is what the product is multiplied with in PEFT's forward pass: α/r, or α/√r for rsLoRA.
    The output projection of `nn.MultiheadAttention` ("attention-out") gets twice that, because
    PEFT's forward pass, and so its training, applies it twice. None where no config tells alpha.

    `method` names what is stored otherwise than as A and B; these are then computed from `stored`.
    With `flat` the weight may be a convolution's (see `ModuleShape`).
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
    scale_from: str = ""
    method: str = "LoRA"
    stored: tuple[TensorInfo, ...] = ()
    flat: bool = False

    @property
    def algorithm(self) -> str:
        if self.magnitude is None:
            return self.method
        return "DoRA" if self.method == "LoRA" else f"{self.method} with a magnitude"

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a.shape else 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product B·A, convolution kernels flattened into `in`."""
        out = self.b.shape[0] if self.b.shape else 0
        return out, math.prod(self.a.shape[1:]) * self.blocks_a

    @property
    def outline(self) -> ModuleShape:
        out, width = self.shape
        inner = self.a.shape[1:] if self.blocks_a == 1 else (width,)
        return ModuleShape(self.path, self.kind, out, inner, flat=self.flat)

    @property
    def weight_name(self) -> str:
        """The tensor of the model that the delta is added to."""
        leaf = "in_proj_weight" if self.kind == "attention-in" else "weight"
        return f"{self.path}.{leaf}"

    @property
    def dtype(self) -> str:
        return self.a.dtype

    @property
    def parts(self) -> dict[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    @property
    def tensors(self) -> list[TensorInfo]:
        return [t for t in (self.a, self.b, self.magnitude, self.bias) if t is not None]

    @property
    def is_sound(self) -> bool:
        a, b = self.a.shape, self.b.shape
        fit = len(a) >= 2 and len(b) >= 2 and 0 not in (*a, *b) and b[1] * self.blocks_b == a[0]
        return fit and self.a.is_float and self.b.is_float

    @property
    def adds(self) -> bool:
        return self.magnitude is None

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.stored or self.tensors)

    def left_right(self, files: FilePool | None = None) -> tuple[Matrix, Matrix]:
        """`(B [out, r], A [r, in])` as float32 matrices, blocks put on their diagonal."""
        a = read_float32(self.a, files).reshape(self.rank, -1)
        b = read_float32(self.b, files).reshape(self.b.shape[0], -1)
        if self.blocks_a > 1:
            a = block_diagonal(a, self.blocks_a)
        if self.blocks_b > 1:
            b = block_diagonal(b, self.blocks_b)
        return b, a

    def part_of(self, files: FilePool) -> Part:
        b, a = self.left_right(files)
        return lambda rows, columns: b[rows] @ a[:, columns]


def block_diagonal(stacked: Matrix, count: int) -> Matrix:
    """`[n, m]` holding `count` blocks one above the other -> `[n, m·count]` block-diagonal."""
    rows, width = stacked.shape[0] // count, stacked.shape[1]
    out = np.zeros((stacked.shape[0], width * count), np.float32)
    for i in range(count):
        part = slice(i * rows, (i + 1) * rows)
        out[part, i * width : (i + 1) * width] = stacked[part]
    return out
