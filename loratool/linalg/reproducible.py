"""Products of matrices that come out the same on every machine, whatever its BLAS.

Factors are put on a grid on which every product and every sum of products is exact in float64, so
that the order of a sum cannot change a bit.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def on_grid(factor: Float64, bits: int, axis: int) -> Float64:
    """Multiples of a power of two, one along `axis`, that need at most `bits` bits."""
    largest = np.abs(factor).max(axis=axis, keepdims=True, initial=0)
    exponent = np.frexp(largest)[1] - bits
    on: Float64 = np.ldexp(np.rint(np.ldexp(factor, -exponent)), exponent)
    return on


def bits_of_grid(rank: int) -> int:
    """The bits that each factor of a product with `rank` terms may have, for it to be exact."""
    return (53 - math.ceil(math.log2(max(1, rank)))) // 2


def reproducible_product(left: npt.ArrayLike, right: npt.ArrayLike) -> Float64:
    """`left [n, r] · right [r, m]` in float64, with an error near 2⁻⁴⁰ of ‖row‖·‖column‖.

    Each factor is what its grid holds and a rest on a finer grid; of the four products that of the
    two rests is left out. Which rows and columns are asked for together changes no element.
    """
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    bits = bits_of_grid(a.shape[1])
    coarse_a, coarse_b = on_grid(a, bits, 1), on_grid(b, bits, 0)
    fine_a, fine_b = on_grid(a - coarse_a, bits, 1), on_grid(b - coarse_b, bits, 0)
    product: Float64 = coarse_a @ coarse_b
    product += coarse_a @ fine_b
    product += fine_a @ coarse_b
    return product
