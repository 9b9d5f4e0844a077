"""Which scale is for which value: one a tensor, a row, a block or a group of a row.

A stack of matrices `[E, R, C]` is seen as the matrix `[E·R, C]`, in which blocks begin anew with
every matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import UNQUANTISED, Module
from loratool.models.quantised.numbers import scales_as_float32
from loratool.models.quantised.scheme import Floats, broken_part
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

    def of_rows(self, first: int, last: int) -> Floats:
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


def refuse_overflow(out: Floats, scales: Floats, largest: float, info: TensorInfo) -> None:
    """Raise BaseError where a product of scales, a part of the weight, and codes up to `largest`
    is none that float32 holds."""
    may = np.abs(scales).max() > np.finfo(np.float32).max / largest
    if may and not np.isfinite(out).all():
        raise broken_part(info, "it makes numbers that float32 cannot hold")


def fitting_grid(
    module: Module,
    shape: tuple[int, ...],
    scale: TensorInfo,
    blocks: Sequence[Block],
    usual: Sequence[Block] = (),
    whole: bool = False,
) -> Grid:
    """The grid that the scales of a weight, a matrix or a stack of them, are of, by their shape.

    `blocks` are those that the model names; where `whole` a scale may be one of a row, or of a
    matrix; those that are `usual` are tried last. Raises BaseError where none fits, and where
    several with another meaning do.
    """
    if len(shape) not in (2, 3) or not math.prod(shape):
        module.refuse(f"it is {list(shape)}, which is no matrix and no stack of matrices")
    own = scale.shape
    if len(own) == 4 and own[1::2] == (1, 1):  # ModelOpt keeps the axes of a block
        own = own[::2]
    named: list[_Way] = [
        *_in_blocks(module, shape, blocks),
        *(_of_whole(module, shape) if whole else ()),
    ]
    fitting = [grid for grid, wanted in named if wanted == own]
    others = _in_blocks(module, shape, usual)
    fitting = fitting or [grid for grid, wanted in others if wanted == own]
    if not fitting:
        module.want_shape(scale, *(wanted for _, wanted in named or others))
    if len({_meaning(grid, shape[-2]) for grid in fitting}) > 1:
        first, last = (
            f"{grid.block[0]}×{grid.block[1]} in {grid.height} rows"
            for grid in (fitting[0], fitting[-1])
        )
        module.refuse(
            f"{scale.name} is {list(scale.shape)}, which fits blocks of {first} and of {last}",
            UNQUANTISED,
        )
    return fitting[0]


#: A grid and the shape that its scales have.
_Way = tuple[Grid, tuple[int, ...]]


def _heights(module: Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows in which blocks may begin anew: a matrix, or half of one. Gate and up of a stack are
    quantised apart, and then joined with their scales."""
    rows = shape[-2]
    joined = len(shape) == 3 and module.name.endswith("gate_up_proj") and rows % 2 == 0
    return (rows, rows // 2) if joined else (rows,)


def _in_blocks(module: Module, shape: tuple[int, ...], blocks: Sequence[Block]) -> list[_Way]:
    *stack, rows, columns = shape
    grids = [
        Grid(height, columns, block)
        for height in _heights(module, shape)
        for block in dict.fromkeys(blocks)
    ]
    return [(grid, (*stack, rows // grid.height * grid.down, grid.across)) for grid in grids]


def _of_whole(module: Module, shape: tuple[int, ...]) -> list[_Way]:
    """A scale for each row, for each matrix (or half of one), or for all of them."""
    *stack, rows, columns = shape
    row, matrix = Grid(rows, columns, (1, columns)), Grid(rows, columns, (rows, columns))
    total = math.prod(shape[:-1])
    everything = Grid(total, columns, (total, columns))
    return [
        *((Grid(height, columns, (height, columns)), (*stack, rows // height, 1))
          for height in _heights(module, shape)),
        (row, (*stack, rows, 1)), (row, (*stack, rows)), (everything, (1,)), (everything, ()),
        *((matrix, short) for short in ((*stack, 1), (*stack,)) if stack),
    ]  # fmt: skip


def _meaning(grid: Grid, rows: int) -> tuple[int, ...]:
    """What two grids have in common that cut a matrix alike."""
    height, width = min(grid.block[0], grid.height), min(grid.block[1], grid.columns)
    return (rows if grid.height % height == 0 else grid.height, height, width)


def _parts(size: int, part: int) -> int:
    return -(-size // part)
