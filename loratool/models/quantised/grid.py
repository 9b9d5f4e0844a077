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

from loratool.models.quantised.module import UNQUANTISED, Module
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
    module: Module, weight: TensorInfo, scale: TensorInfo, blocks: Iterable[Block]
) -> Grid:
    """The grid that the scales of a weight are of, told from their shape.

    `blocks` are those that the model names. Raises BaseError where none fits, and where several
    with another meaning do.
    """
    *stack, rows, columns = weight.shape
    if not weight.numel:
        module.refuse(f"{weight} is empty")
    blocks = list(dict.fromkeys(blocks))
    count = math.prod(stack)
    shape = _without_ones(scale.shape) if len(scale.shape) == 4 else scale.shape
    if len(shape) <= 1 and scale.numel == 1:
        return Grid(count * rows, columns, (count * rows, columns))
    if shape in ((*stack, rows, 1), (*stack, rows)):
        return Grid(rows, columns, (1, columns))
    if stack and shape in ((*stack,), (*stack, 1)):
        return Grid(rows, columns, (rows, columns))
    # Gate and up of a stack are quantised apart and then joined, with their scales.
    halves = [rows // 2] if weight.name.endswith("gate_up_proj") and rows % 2 == 0 else []
    if not blocks:
        blocks = [(height, columns) for height in (rows, *halves)]
    grids = [Grid(height, columns, block) for block in blocks for height in (rows, *halves)]
    shapes = [(*stack, rows // grid.height * grid.down, grid.across) for grid in grids]
    found = [grid for grid, wanted in zip(grids, shapes, strict=True) if wanted == shape]
    if not found:
        module.want_shape(scale, *shapes)
    if len({_meaning(grid, rows) for grid in found}) > 1:
        ways = [f"{_size(grid.block)} in {grid.height} rows" for grid in (found[0], found[-1])]
        module.refuse(
            f"{scale.name} is {list(scale.shape)}, which fits blocks of {ways[0]} and of {ways[1]}",
            UNQUANTISED,
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
    return (shape[0], shape[2]) if (shape[1], shape[3]) == (1, 1) else shape


def _parts(size: int, part: int) -> int:
    return -(-size // part)
