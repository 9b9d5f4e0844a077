"""The noise edge: how many singular values of a product of factors stand above those of noise.

The null model. Of the r directions of B·A (`B [m, r]`, `A [r, n]`) k carry a signal, and in the
j = r − k others both factors have independent entries of mean 0 and of one variance each. The
eigenvalues of (BᵀB/m)(A·Aᵀ/n) then follow the free multiplicative convolution of two laws of
Marchenko and Pastur (1967) with the ratios b = j/m and a = j/n. By the S-transforms 1/(1 + b·z) and
1/(1 + a·z) (Voiculescu, 1987; for Gaussian products Burda, Jarosz, Livan, Nowak, Swiech, Phys. Rev.
E 82, 061114, 2010) the inverse of the law's moment function is

    x(z) = (1 + z)·(1 + b·z)·(1 + a·z)/z,

and the ends of the spectrum are where x′ = 0: the upper edge λ₊ at z > 0, the lower edge λ₋ at
z < −1. With a = 0 this is (1 ± √b)², the edges of one such law. The mean of the law is 1, so the
mean square of the j values is the variance of the noise, τ, and σ² ≤ τ·λ₊ for noise.

The largest value of a finite j scatters about the edge by Tracy and Widom's law, in steps of
δ = (j·√(2/|x″|)/λ)^(−2/3): near the edge the density is √(2·|λ − x|/|x″|)/(π·λ). 99.9 % of it is
below 3.27 steps, which are added to the edge.

k is the smallest number for which the values after the first k lie between both edges (Kritchman
and Nadler, IEEE Trans. Signal Process. 57, 2009, test from the largest value downwards like this).
The lower edge matters: training leaves spectra that fall on and on, and of those hardly a part is
as flat as noise is. Where no part is, or too few values are left to tell, there is no edge: j must
be such that noise is narrower than j values that fall by a twentieth from each to the next.

Why both factors: lora_A begins random and moves little, and lora_B is the sum of gradients seen
through it, so gradients that are noise give a B of independent entries. Where they are not equally
strong in all rows the noise is wider than this law, and more is kept than needed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratool.linalg.lowrank import NEGLIGIBLE, Float64

#: 99.9 % of the Tracy-Widom law of real matrices is below this.
_RARE = 3.27

#: So many values, and this share of all of them, must look like noise before they are called so.
_FEWEST, _SHARE = 4, 0.25

#: So many values must tell noise from values that fall by this factor, each from the one before:
#: slower than trained spectra mostly do. The narrower the matrix, the more values that takes.
_FALL = 0.95

#: Halvings of the ranges in which the edges lie.
_STEPS = 60

#: Why there is no edge: a rank too low to tell, or too large for its matrix, or no flat part.
NoEdge = Literal["", "few", "wide", "falling", "zero"]


#: The same in words, of modules.
NO_EDGE_WORDS: dict[NoEdge, str] = {
    "few": f"fewer than {_FEWEST} singular values, too few to tell",
    "wide": "so narrow a matrix that noise of this rank may look like any spectrum",
    "falling": "a spectrum that falls to its end, with no part as flat as noise",
    "zero": "no delta",
}


@dataclass(frozen=True)
class NoiseEdge:
    """How many singular values of one product are `above` what noise has, whose largest is `edge`.

    Where the model does not apply `edge` is None, `why` says so, and all values that are not
    negligible are `above`.
    """

    above: int
    edge: float | None
    why: NoEdge = ""


def noise_edge(values: Float64, out: int, width: int) -> NoiseEdge:
    """The noise edge of `values [r]`, largest first: singular values of B·A `[out, width]`.

    Any factor that all of them have in common makes no difference.
    """
    values = values[values > NEGLIGIBLE * float(values.max(initial=0.0))]
    rank = len(values)
    if not rank:
        return NoiseEdge(0, None, "zero")
    least = max(_FEWEST, math.ceil(_SHARE * rank))
    if rank < least:
        return NoiseEdge(rank, None, "few")
    if rank >= min(out, width):
        return NoiseEdge(rank, None, "wide")
    low, high = (edges[rank - 1 :: -1] for edges in _edges(rank, out, width))  # by k: j = r − k
    left = np.arange(rank, 0, -1)
    tells = (left >= least) & (high * _FALL ** (2 * (left - 1)) <= low)
    if not tells.any():
        return NoiseEdge(rank, None, "wide")
    squares = (values / values[0]) ** 2
    means = np.cumsum(squares[::-1])[::-1] / left
    fits = (squares <= means * high) & (squares[-1] >= means * low)
    found = np.flatnonzero(fits & tells)
    if not len(found):
        return NoiseEdge(rank, None, "falling")
    above = int(found[0])
    return NoiseEdge(above, float(values[0] * np.sqrt(means[above] * high[above])))


@functools.lru_cache(maxsize=256)
def _edges(rank: int, out: int, width: int) -> tuple[Float64, Float64]:
    """Where noise of j = 1 … rank directions begins and ends, in units of its mean square, with
    what chance adds: `[rank]` each. Below the smaller side."""
    j = np.arange(1, rank + 1, dtype=np.float64)
    b, a = j / out, j / width
    s = a + b + a * b
    # x′ = (2ab·z³ + s·z² − 1)/z², with one root above 0, below 1/√s, and one from −1/max(a, b)
    # to −1.
    upper = _root(a, b, s, np.zeros(rank), 1 / np.sqrt(s))
    lower = _root(a, b, s, -np.ones(rank), -1 / np.maximum(a, b))
    return _edge(j, a, b, lower, -1.0), _edge(j, a, b, upper, 1.0)


def _root(a: Float64, b: Float64, s: Float64, below: Float64, above: Float64) -> Float64:
    """Where 2ab·z³ + s·z² − 1 becomes positive on the way from `below` to `above`."""
    for _ in range(_STEPS):
        middle = (below + above) / 2
        positive = 2 * a * b * middle**3 + s * middle**2 > 1
        below, above = np.where(positive, below, middle), np.where(positive, middle, above)
    return (below + above) / 2


def _edge(j: Float64, a: Float64, b: Float64, z: Float64, side: float) -> Float64:
    edge = (1 + z) * (1 + b * z) * (1 + a * z) / z
    bend = np.abs(2 / z**3 + 2 * a * b)
    step = (j * np.sqrt(2 / bend) / edge) ** (-2 / 3)
    return np.asarray(edge + side * _RARE * step)
