"""Factors of a stack of experts: a parameter `[E, d1, d2]` with a pair `B·A` for each expert.

PEFT trains bare parameters (`target_parameters`) with all experts' factors in two matrices. An
`ExpertStack` is such an entry of an adapter; `expert` gives the pair of one expert, which is what a
merge places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from loratool.adapters.expertvalues import Matrices, of_experts
from loratool.adapters.factors import Kind, Matrix, ModuleShape, Part
from loratool.adapters.told import Packing
from loratool.errors import unknown
from loratool.storage.tensors import FilePool, TensorInfo, blocks

#: What a user can say of a B of two axes.
FLAT_PACKINGS: tuple[Packing, ...] = ("rank-major", "grouped")

#: Elements in float32 that a batch of experts has.
_BATCH = 4_000_000


def flat_packing(name: str | None) -> Packing | None:
    """The packing of this name. Raises UsageError for what is none."""
    found = next((known for known in FLAT_PACKINGS if known == name), None)
    if name is not None and found is None:
        raise unknown("expert_b_layout", name, FLAT_PACKINGS)
    return found


@dataclass(frozen=True)
class ExpertStack:
    """Factors of a parameter `[E, d1, d2]` with a matrix per expert.

    A is `[E·r, in]` or `[E, r, in]`; B is as `packing` says, flattened to two axes or not. A factor
    that all experts share is `[r, in]` or `[out, r]`. A bare matrix that is no layer's weight has
    `experts` 1, and its factors are those of a linear layer.

    `[out, in]` of one expert's `B·A` is `[d1, d2]`, or `[d2, d1]` of a parameter to which Δ is
    added transposed ("swapped"): shapes tell, and where they are square `orientation`.
    """

    path: str
    parameter: str
    a: TensorInfo
    b: TensorInfo
    experts: int
    rank: int
    alpha: float | None
    scale: float | None
    packing: Packing = "rank-major"
    #: The version of PEFT that wrote it, where that is known.
    peft_version: str = ""
    scale_from: str = ""
    kind: Kind = field(default="experts", init=False)
    algorithm: str = field(default="LoRA", init=False)
    magnitude: None = field(default=None, init=False)
    bias: None = field(default=None, init=False)
    adds: bool = field(default=True, init=False)

    @property
    def weight_name(self) -> str:
        """The parameter that Δ is added to."""
        return f"{self.path}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of one expert's product B·A."""
        return self._out, self.a.shape[-1] if self.a.shape else 0

    @property
    def _out(self) -> int:
        axis = 1 if self.packing == "stacked" and len(self.b.shape) == 3 else 0
        return self.b.shape[axis] if len(self.b.shape) > axis else 0

    @property
    def outline(self) -> ModuleShape:
        out, width = self.shape
        return ModuleShape(self.weight_name, self.kind, out, (width,))

    @property
    def dtype(self) -> str:
        return self.a.dtype

    @property
    def parts(self) -> dict[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    @property
    def tensors(self) -> list[TensorInfo]:
        return [self.a, self.b]

    @property
    def parameters(self) -> int:
        return self.a.numel + self.b.numel

    @property
    def shares(self) -> tuple[bool, bool]:
        """Whether all experts have the same A, and the same B."""
        out, width = self.shape
        one = self.experts == 1
        return (
            not one and self.a.numel == self.rank * width,
            not one and self.b.numel == self.rank * out,
        )

    @property
    def is_sound(self) -> bool:
        out, width = self.shape
        sizes = [(self.a, width), (self.b, out)]
        return (
            0 not in (out, width, self.rank, self.experts)
            and all(2 <= len(t.shape) <= 3 and t.is_float for t, _ in sizes)
            and all(t.numel in (self.rank * n, self.experts * self.rank * n) for t, n in sizes)
        )

    def expert(self, index: int, swapped: bool = False) -> ExpertPair:
        """The pair of one expert; `swapped` if Δ is added transposed."""
        return ExpertPair(self, index, swapped)

    def orientation(self, transposed_experts: bool) -> bool | None:
        """Whether Δ of a square parameter is added transposed; None if nothing tells.

        `transposed_experts` says that the model's class has `is_transposed`. PEFT looks at it since
        0.19.0, at first the wrong way round; what was trained between releases may be either.
        """
        found = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", self.peft_version)
        if found is None:
            return None
        version = (int(found[1]), int(found[2]), int(found[3]))
        if found[4] and (0, 18, 1) < version < (0, 19, 2):
            return None
        if version < (0, 19, 0):
            return True
        return transposed_experts if version > (0, 19, 0) else not transposed_experts

    def left_right(self, files: FilePool | None = None) -> None:
        """There is no one pair; each expert has one."""

    def part_of(self, files: FilePool) -> Part:
        raise TypeError(f"{self.weight_name} has a Δ per expert")

    def batches(self, files: FilePool) -> Iterator[tuple[range, Matrices, Matrices]]:
        """Some experts at a time: their numbers, B `[n, out, r]` and A `[n, r, in]` in float32."""
        out, width = self.shape
        size = max(1, _BATCH // (self.rank * max(out, width)))
        for low, high in blocks(self.experts, size):
            yield range(low, high), self._b(files, low, high), self._a(files, low, high)

    def _a(self, files: FilePool, low: int, high: int) -> Matrices:
        """A of experts `[low, high)`, `[n, r, in]`."""
        of_one = (self.rank, self.shape[1])
        return of_experts(self.a, self.experts, of_one, "stacked", self.shares[0], low, high, files)

    def _b(self, files: FilePool, low: int, high: int) -> Matrices:
        """B of experts `[low, high)`, `[n, out, r]`."""
        of_one = (self.shape[0], self.rank)
        packing: Packing = "stacked" if self.experts == 1 else self.packing
        return of_experts(self.b, self.experts, of_one, packing, self.shares[1], low, high, files)


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """The pair of one expert: what is added to the matrix `index` of a stack.

    `shape` is that of the matrix as the parameter has it in memory, if `swapped` is right.
    """

    stack: ExpertStack
    index: int
    swapped: bool = False

    @property
    def path(self) -> str:
        return f"{self.stack.weight_name}.{self.index}"

    @property
    def kind(self) -> Kind:
        return "linear"

    @property
    def algorithm(self) -> str:
        return self.stack.algorithm

    @property
    def alpha(self) -> float | None:
        return self.stack.alpha

    @property
    def scale(self) -> float | None:
        return self.stack.scale

    @property
    def scale_from(self) -> str:
        return self.stack.scale_from

    @property
    def magnitude(self) -> None:
        return None

    @property
    def bias(self) -> None:
        return None

    @property
    def rank(self) -> int:
        return self.stack.rank

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.stack.shape
        return (width, out) if self.swapped else (out, width)

    @property
    def outline(self) -> ModuleShape:
        out, width = self.shape
        return ModuleShape(self.path, self.kind, out, (width,))

    @property
    def dtype(self) -> str:
        return self.stack.dtype

    @property
    def parts(self) -> dict[str, TensorInfo]:
        return self.stack.parts

    @property
    def tensors(self) -> list[TensorInfo]:
        """Those of the stack: an expert has none of its own."""
        return self.stack.tensors

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)

    @property
    def weight_name(self) -> str:
        return self.stack.weight_name

    @property
    def is_sound(self) -> bool:
        return self.stack.is_sound and 0 <= self.index < self.stack.experts

    @property
    def adds(self) -> bool:
        return True

    def left_right(self, files: FilePool | None = None) -> tuple[Matrix, Matrix]:
        """`(B [out, r], A [r, in])` in float32; `(Aᵀ, Bᵀ)` if swapped."""
        if files is None:
            with FilePool() as own:
                return self.left_right(own)
        b = self.stack._b(files, self.index, self.index + 1)[0]
        a = self.stack._a(files, self.index, self.index + 1)[0]
        if self.swapped:
            b, a = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a

    def part_of(self, files: FilePool) -> Part:
        b, a = self.left_right(files)
        return lambda rows, columns: b[rows] @ a[:, columns]
