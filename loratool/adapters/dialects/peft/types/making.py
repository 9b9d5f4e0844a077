"""Factors whose A and B are computed from what a file holds, and blocks of rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapters.dialects.peft.types.method import PeftModule
from loratool.adapters.factors import Kind, LowRank, Matrix, ModuleShape, Part
from loratool.adapters.structured import Structured
from loratool.adapters.told import Scaling
from loratool.errors import ValueRangeError
from loratool.storage.composed import joined
from loratool.storage.computed import Formula, computed_tensor
from loratool.storage.tensors import TensorInfo

Array = npt.NDArray[np.floating[Any]]
#: Row numbers and column numbers of a part of Δ.
Numbers = npt.NDArray[np.intp]


def computed_factor(
    name: str, shape: Sequence[int], parts: Sequence[TensorInfo], formula: Formula
) -> TensorInfo:
    """A factor that `formula` makes of `parts`, computed in float64."""
    dtype = "F64" if any(t.dtype == "F64" for t in parts) else "F32"
    return computed_tensor(name, shape, parts, partial(_in_double, formula), dtype)


def _in_double(formula: Formula, *arrays: Array) -> Array:
    return formula(*(a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays))


def places_within(numbers: Array | Numbers, size: int, what: str) -> Numbers:
    """Whole numbers that count something of which there are `size`.

    Raises ValueRangeError for others; `what` has them.
    """
    found = np.asarray(numbers).astype(np.int64)
    if found.size and not 0 <= found.min() <= found.max() < size:
        raise ValueRangeError(
            f"{what} has numbers from {found.min()} to {found.max()}; there are {size} of what it "
            "counts.",
            "The file is damaged, or for another model. Fetch it again.",
        )
    return found


def reshaped(info: TensorInfo, *shape: int) -> TensorInfo:
    """The same elements in another shape."""
    return joined(info.name, shape, [info])


def computed_pair(
    module: PeftModule,
    method: str,
    b: TensorInfo,
    a: TensorInfo,
    scaled: Scaling,
    kind: Kind = "linear",
    flat: bool = False,
) -> LowRank:
    """`Δ = B·A` with factors that are computed from the tensors of a module."""
    return LowRank(
        module.path, kind, a, b, scaled.alpha, scaled.scale, scale_from=scaled.origin,
        method=method, stored=tuple(module.tensors.values()), flat=flat,
    )  # fmt: skip


def structured(
    module: PeftModule,
    method: str,
    shape: tuple[int, int],
    parts: dict[str, TensorInfo],
    load: Callable[..., Part],
    rank: int,
    scaled: Scaling,
    flat: bool = False,
) -> Structured:
    """A Δ of this shape that `load` makes of `parts`."""
    outline = ModuleShape(module.path, "linear", shape[0], (shape[1],), flat=flat)
    return Structured(
        method, outline, parts, load, min(rank, *shape), scaled.alpha, scaled.scale, scaled.origin
    )


def elementwise(shape: tuple[int, int], element: Callable[[Numbers, Numbers], Array]) -> Part:
    """The part of a Δ whose elements `element` gives, from rows `[n, 1]` and columns `[1, m]`."""

    def part(rows: slice | Numbers, columns: slice) -> Matrix:
        i, j = np.arange(shape[0])[rows], np.arange(shape[1])[columns]
        return element(i[:, None], j[None, :]).astype(np.float32)

    return part


#: Elements of factors that are computed at most: a small file could ask for any number.
_MOST = 1 << 28


def is_smaller(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank hold fewer numbers than Δ, and can be computed."""
    count = rank * sum(shape)
    return count < shape[0] * shape[1] and count <= _MOST


def drawn(
    name: str,
    beside: TensorInfo,
    shapes: Sequence[Sequence[int]],
    draw: Callable[[], Sequence[Array]],
) -> list[TensorInfo]:
    """Tensors that are in no file, in float32: what `draw` gives when somebody reads one of them.

    `beside` is any tensor of the file.
    """
    return [
        computed_tensor(f"{name}, number {i}", shape, [beside], partial(_one_of, draw, i))
        for i, shape in enumerate(shapes)
    ]


def _one_of(draw: Callable[[], Sequence[Array]], number: int, beside: Array) -> Array:
    return draw()[number]
