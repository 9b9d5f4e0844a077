"""Small sets of factors, and pruning and election by their definitions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from loratool.linalg.methods import Combined, Term

EPS32 = 2.0**-23
PATH = "model.layers.0.q_proj"

#: out, in, and the ranks of the adapters.
SHAPES: dict[str, tuple[int, int, list[int]]] = {
    "square": (24, 24, [4, 4]),
    "wide": (12, 40, [4, 4]),
    "tall": (40, 12, [4, 4]),
    "rank 1": (15, 20, [1, 1]),
    "rank above width": (20, 6, [9, 9]),
    "rank above both": (6, 9, [10, 10]),
    "unequal ranks": (20, 30, [2, 6, 3]),
    "one adapter": (20, 18, [5]),
    "three adapters": (20, 18, [3, 3, 3]),
    "more adapters than rows": (3, 14, [1, 1, 1, 1, 1]),
    "long": (1100, 6, [2, 2]),
    "broad": (6, 1100, [2, 2]),
}


def terms_of(case: str) -> list[Term]:
    """The adapters of a case, float32, with weights and scales that float32 must round."""
    out, width, ranks = SHAPES.get(case, (20, 16, [3, 3, 3]))
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    weights, scales = [0.7, 1.3, 0.4, 0.9, 1.1], [2.0, 0.3, 1.1, 0.7, 1.9]
    if case == "negative weights":
        weights = [0.7, -1.3, 0.4]
    elif case == "all negative":
        weights = [-0.7, -1.3, -0.4]
    terms = []
    for i, rank in enumerate(ranks):
        b = rng.standard_normal((out, rank)).astype(np.float32)
        a = rng.standard_normal((rank, width)).astype(np.float32)
        if case == "float16 values":
            b, a = (x.astype(np.float16).astype(np.float32) for x in (b, a))
        elif case == "zero-padded":
            b[:, 3 - i :], a[3 - i :] = 0, 0
        elif case == "repeated rows of a":  # B has more directions than the deltas
            a[2] = a[1]
        elif case == "columns far apart" and i == 1:
            b[:, 0] *= np.float32(1e6)
            a[0] *= np.float32(1e-6)
        elif case == "factors far apart":
            b, a = b * np.float32(1e-3), a * np.float32(1e3)
        elif case == "adapters far apart" and i == 1:
            b = b * np.float32(1e-4)
        elif case.startswith("duplicated") and i in ((1,) if case == "duplicated" else (1, 2)):
            b, a = terms[0].b.copy(), terms[0].a.copy()
        # Indices with gaps: adapters that lack the module or have weight 0 are left out.
        terms.append(Term(2 * i + 1, weights[i], scales[i], b, a))
    return terms


def product(found: Combined) -> np.ndarray:
    return found.b.astype(np.float64) @ found.a.astype(np.float64)


def largest(x: np.ndarray, density: float) -> np.ndarray:
    """int(density·n) entries of largest magnitude, of equal ones the first."""
    kept = np.argsort(-np.abs(x), axis=None, kind="stable")[: int(density * x.size)]
    result = np.zeros_like(x)
    result.flat[kept] = x.flat[kept]
    return result


def elected(xs: Sequence[np.ndarray], weights: Sequence[float], how: str) -> np.ndarray:
    """TIES, entry by entry, of the adapters as they are added: a subtracted one is negated."""
    result = np.zeros_like(xs[0])
    for place in np.ndindex(xs[0].shape):
        entries = [np.sign(w) * x[place] for w, x in zip(weights, xs, strict=True)]
        vote = sum(entries) if how == "total" else sum(np.sign(e) for e in entries)
        sign = 1 if vote >= 0 else -1
        agreeing = [(abs(w), e) for w, e in zip(weights, entries, strict=True) if e * sign > 0]
        result[place] = sum(w * e for w, e in agreeing) / max(1, len(agreeing))
    return result
