"""Integers again, on the grid that they are on: scales and zero points were calibrated and stay.

What comes to lie beyond the last code of its group gets that code.
"""

from __future__ import annotations

import numpy as np

from loratool.models.quantised.numbers import (
    add_groups,
    divide_groups,
    multiply_groups,
    subtract_groups,
)
from loratool.models.quantised.scheme import Floats


def on_grid(
    values: Floats,
    scales: Floats,
    zeros: Floats | None,
    group: int,
    codes: tuple[int, int],
    stand_for: Floats | None = None,
) -> Floats:
    """The whole numbers, from the first to the last of `codes`, that are nearest to value/scale +
    zero.

    `scales` and `zeros` are `[n, groups]`, one for `group` columns. `stand_for` is filled with what
    the codes are.
    """
    numbers = values.copy()
    divide_groups(numbers, np.where(scales == 0, np.float32(1), scales), group)
    np.rint(numbers, out=numbers)
    if zeros is not None:
        add_groups(numbers, zeros, group)
    np.clip(numbers, *codes, out=numbers)
    if stand_for is not None:
        stand_for[:] = numbers
        if zeros is not None:
            subtract_groups(stand_for, zeros, group)
        multiply_groups(stand_for, scales, group)
    return numbers
