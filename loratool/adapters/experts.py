"""Factors of a stack of experts: a parameter `[E, d1, d2]` with a pair `B·A` for each expert.

PEFT trains bare parameters (`target_parameters`) with all experts' factors in two matrices. An
`ExpertStack` is such an entry of an adapter; `expert` gives the pair of one expert, which is what a
merge places. In A an expert's rows lie together, in B mostly not, so that one expert's B touches
all of it: B is then sorted by expert once and kept while its neighbours are asked for.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from loratool.adapters.factors import Kind, Matrix, ModuleShape, Part
from loratool.errors import unknown
from loratool.storage.tensors import FilePool, TensorInfo, as_float32, block_elements, blocks
from loratool.storage.values import values_of

#: How B holds its experts, whether its axes are apart or flattened. `rank-major`, PEFT's way, is
#: `[out, r, E]`; `grouped`, of Unsloth's older files, `[out, E, r]`; `stacked` `[E, out, r]`.
Packing = Literal["rank-major", "grouped", "stacked"]

#: What a user can say of a B of two axes.
FLAT_PACKINGS: tuple[Packing, ...] = ("rank-major", "grouped")

#: Bytes of sorted factors that are kept: both stacks of a layer, at the size of the largest models
#: in float32 (47 MB), for two threads; or those of several smaller adapters.
_KEPT = 192_000_000

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
    kind: Kind = field(default="experts", init=False)
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
        return _of_experts(
            self.a, self.experts, of_one, "stacked", self.shares[0], low, high, files
        )

    def _b(self, files: FilePool, low: int, high: int) -> Matrices:
        """B of experts `[low, high)`, `[n, out, r]`."""
        of_one = (self.shape[0], self.rank)
        packing: Packing = "stacked" if self.experts == 1 else self.packing
        return _of_experts(self.b, self.experts, of_one, packing, self.shares[1], low, high, files)


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
    def alpha(self) -> float | None:
        return self.stack.alpha

    @property
    def scale(self) -> float | None:
        return self.stack.scale

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


#: Matrices of several experts, `[n, rows, columns]`.
Matrices = npt.NDArray[np.float32]

#: The stored values of a factor sorted by expert, `[E, rows, columns]`, in their own precision.
_Sorted = npt.NDArray[Any]


def _of_experts(
    info: TensorInfo,
    experts: int,
    of_one: tuple[int, int],
    packing: Packing,
    shared: bool,
    low: int,
    high: int,
    files: FilePool,
) -> Matrices:
    """The factors of experts `[low, high)`, each of the shape `of_one`, in float32."""
    size = math.prod(of_one)
    if shared:
        values = values_of(info, files).floats(0, size).reshape(1, *of_one)
        return np.broadcast_to(values, (high - low, *of_one))
    if packing == "stacked" and info.strides is None:
        return values_of(info, files).floats(low * size, high * size).reshape(-1, *of_one)
    chosen = _kept_of(files).get(info, (experts, *of_one), packing, files)[low:high]
    return as_float32(chosen.reshape(-1).view(np.uint8), info.dtype).reshape(chosen.shape)


class _Entry:
    """One factor, sorted when it is asked for first; who comes meanwhile waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: _Sorted | None = None


class _Kept:
    """Factors sorted by expert, the latest ones that were asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[TensorInfo, _Entry] = OrderedDict()

    def get(
        self, info: TensorInfo, shape: tuple[int, int, int], packing: Packing, files: FilePool
    ) -> _Sorted:
        with self._lock:
            entry = self._entries.setdefault(info, _Entry())
            self._entries.move_to_end(info)
            while len(self._entries) > 1 and sum(t.nbytes for t in self._entries) > _KEPT:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.values is None:
                entry.values = _sorted(info, shape, packing, files)
            return entry.values


#: What is kept of the files of a pool, as long as there is the pool.
_KEPT_OF: WeakKeyDictionary[FilePool, _Kept] = WeakKeyDictionary()
_KEPT_LOCK = threading.Lock()


def _kept_of(files: FilePool) -> _Kept:
    with _KEPT_LOCK:
        return _KEPT_OF.setdefault(files, _Kept())


def _sorted(
    info: TensorInfo, shape: tuple[int, int, int], packing: Packing, files: FilePool
) -> _Sorted:
    """The values of a factor as `[E, rows, columns]`, read in blocks."""
    experts, _, columns = shape
    values = values_of(info, files)
    bits = np.dtype(f"u{info.itemsize}")
    if packing == "stacked":
        return values.bytes(0, values.length).view(bits).reshape(shape)
    result = np.empty(shape, bits)
    row = columns * experts
    for low, high in blocks(info.numel, block_elements(row)):
        part = values.bytes(low, high).view(bits)
        here = result[:, low // row : high // row]
        if packing == "grouped":
            here[:] = part.reshape(-1, experts, columns).transpose(1, 0, 2)
        else:
            here[:] = part.reshape(-1, columns, experts).transpose(2, 0, 1)
    return result
