"""Which scale is for which value: one a tensor, a row, a block or a group of a row.

A stack of matrices `[E, R, C]` is seen as the matrix `[E·R, C]`, in which blocks begin anew with
every matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import Module
from loratool.models.quantised.numbers import scales_as_float32
from loratool.models.quantised.scheme import broken_part
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import values_of

#: Rows and columns of a block.
Block = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Blocks over a matrix of so many `columns`: they begin anew every `height` rows, and the last
    one before that, and the last one of a row, may be short."""

    height: int
    columns: int
    block: Block

    @property
    def down(self) -> int:
        """Blocks of `height` rows, one below the other."""
        return _parts(self.height, self.block[0])

    @property
    def across(self) -> int:
        """Blocks of one row."""
        return _parts(self.columns, self.block[1])

    def of_rows(self, first: int, last: int) -> tuple[int, int, npt.NDArray[np.intp]]:
        """Which rows of scales, `[low, high)`, these of the matrix need, and of those each its."""
        rows = np.arange(first, last)
        index = rows // self.height * self.down + rows % self.height // self.block[0]
        low, high = int(index[0]), int(index[-1]) + 1
        return low, high, index - low


class GridScales:
    """Numbers of a grid, a part of a quantised weight, read when they are asked for."""

    def __init__(
        self,
        info: TensorInfo,
        grid: Grid,
        files: FilePool,
        numbers: Callable[[Bytes, str], npt.NDArray[np.float32]] = scales_as_float32,
    ) -> None:
        self._info = info
        self._grid = grid
        self._numbers = numbers
        self._values = values_of(info, files)

    def of_rows(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Those of rows `[first, last)` of the matrix: `[rows, across]`."""
        low, high, index = self._grid.of_rows(first, last)
        across = self._grid.across
        raw = self._values.bytes(low * across, high * across)
        numbers = self._numbers(raw, self._info.dtype)
        if not np.isfinite(numbers).all():
            raise broken_part(self._info, "it holds NaN or infinity")
        numbers = numbers.reshape(-1, across)
        # Where every row has its own there is nothing to repeat.
        return numbers if len(numbers) == len(index) else numbers.take(index, 0)


def fitting_grid(
    module: Module,
    shape: tuple[int, ...],
    scale: TensorInfo,
    blocks: Iterable[Block],
    whole: bool = False,
) -> Grid:
    """The grid that the scales of a weight, a matrix or a stack of them, are of, by their shape.

    `blocks` are those that the model names; where `whole` a scale may be one of a row, or of a
    matrix. Raises BaseError where none fits, and where several with another meaning do.
    """
    if len(shape) not in (2, 3) or not math.prod(shape):
        module.refuse(f"it is {list(shape)}, which is no matrix and no stack of matrices")
    *stack, rows, columns = shape
    total = math.prod(shape[:-1])
    # Gate and up of a stack are quantised apart, and then joined with their scales.
    joined = stack and module.name.endswith("gate_up_proj") and rows % 2 == 0
    heights = (rows, rows // 2) if joined else (rows,)
    ways: list[tuple[Grid, tuple[int, ...]]] = []
    for height in heights:
        for block in dict.fromkeys(blocks):
            grid = Grid(height, columns, block)
            ways.append((grid, (*stack, rows // height * grid.down, grid.across)))
        if whole:
            matrix = Grid(height, columns, (height, columns))
            ways.append((matrix, (*stack, rows // height, 1)))
    if whole:
        row, everything = Grid(rows, columns, (1, columns)), Grid(total, columns, (total, columns))
        ways += [(row, (*stack, rows, 1)), (row, (*stack, rows)), (everything, (1,))]
        ways += [(everything, ())]
        if stack:
            matrix = Grid(rows, columns, (rows, columns))
            ways += [(matrix, (*stack, 1)), (matrix, (*stack,))]
    own = _without_ones(scale.shape)
    found = [grid for grid, wanted in ways if wanted == own]
    if not found:
        module.want_shape(scale, *(wanted for _, wanted in ways))
    if len({_meaning(grid, rows) for grid in found}) > 1:
        first, last = (
            f"{_size(grid.block)} in {grid.height} rows" for grid in (found[0], found[-1])
        )
        module.refuse(
            f"{scale.name} is {list(scale.shape)}, which fits blocks of {first} and of {last}",
            "Merge into the unquantised model that it was made from.",
        )
    return found[0]


def _meaning(grid: Grid, rows: int) -> tuple[int, ...]:
    """What two grids have in common that cut a matrix alike."""
    height, width = min(grid.block[0], grid.height), min(grid.block[1], grid.columns)
    return (rows if grid.height % height == 0 else grid.height, height, width)


def _size(block: Block) -> str:
    return f"{block[0]}×{block[1]}"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ModelOpt keeps the axes of a block: [rows, 1, columns, 1]."""
    return shape[::2] if len(shape) == 4 and shape[1::2] == (1, 1) else shape


def _parts(size: int, part: int) -> int:
    return -(-size // part)
