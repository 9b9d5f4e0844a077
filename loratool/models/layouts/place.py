"""The part of a base tensor that an adapter's factors change.

A place is declared by what is known of an architecture or a dialect, and never read off a shape: a
square matrix has no orientation to read off, and in a fused stack every slice has the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Place:
    """Where a delta Δ `[out, in]` goes in a stored tensor W:

        M = W, or W[expert] in a stack          # further axes flattened: [stored rows, columns]
        M = M.T if transposed else M            # [out, in]
        M[rows] += Δ                            # all rows where `rows` is None

    So `rows` count along `out`, however the matrix is stored: q in a fused qkv is a range, gate in
    an interleaved gate|up a range with the step 2, and a tuple says for every row of Δ which row of
    M it is (rotary orders, swapped halves); it has to be a permutation of such a range. `component`
    names the checkpoint in a base of several ("" where there is one).
    """

    tensor: str
    component: str = ""
    expert: int | None = None
    rows: range | tuple[int, ...] | None = None
    transposed: bool = False

    def matrix(self, stored: Sequence[int]) -> tuple[int, int]:
        """Stored rows and columns of one matrix, in a tensor of this shape."""
        axes = stored[1:] if self.expert is not None else stored
        return axes[0] if axes else 1, math.prod(axes[1:])

    def shape(self, stored: Sequence[int]) -> tuple[int, int]:
        """`(out, in)` of the delta that fits here, in a tensor of this shape."""
        rows, columns = self.matrix(stored)
        out, width = (columns, rows) if self.transposed else (rows, columns)
        return (out if self.rows is None else len(self.rows)), width

    def fits(self, stored: Sequence[int]) -> bool:
        """Whether the tensor has this expert and these rows."""
        if self.expert is not None and not (len(stored) > 1 and 0 <= self.expert < stored[0]):
            return False
        out = self.matrix(stored)[self.transposed]
        return self.rows is None or all(0 <= row < out for row in self.rows)

    def part(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The elements that a delta is added to, `[out, in]`, of a whole tensor as it is stored."""
        whole = values if self.expert is None else values[self.expert]
        matrix = whole.reshape(self.matrix(values.shape))
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[np.asarray(self.rows)]
