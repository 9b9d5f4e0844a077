"""The values nearest to others that the stored scales of a weight allow, and their codes.

What comes near a weight of a quantised model is brought back onto its grid: so codes are told from
plain values, and whether values lie on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.encoding.integers import GridEncoder
from loratool.models.quantised.scheme import Floats, Scheme, SnappingRows
from loratool.storage.tensors import Bytes, FilePool

#: `snap(first, values)` moves rows from `first` on, `[n, columns]`, to the nearest that the grid
#: has, in place, and returns their codes, flat, as the main part of the scheme has them if those of
#: rows lie one after the other there (`row_bytes`).
Snap = Callable[[int, Floats], Bytes]


def snaps(scheme: Scheme) -> bool:
    """Whether it is known which values of a grid are nearest."""
    return scheme.snaps or _encoder(scheme) is not None


def snapping(scheme: Scheme, files: FilePool) -> Snap:
    """What brings rows onto the grid of a weight that `snaps`. Scales are read through `files`."""
    encoder = _encoder(scheme)
    if scheme.snaps or encoder is None:
        rows = scheme.opened(files)
        if not isinstance(rows, SnappingRows):
            raise TypeError(f"{type(scheme).__name__} does not snap; ask `snaps` first")
        return rows.snap
    encoder.open(files)

    def snap(first: int, values: Floats) -> Bytes:
        role = _main_role(scheme)
        return encoder.joined(role, [encoder.encode(role, first, values, values, values)])

    return snap


def row_bytes(scheme: Scheme) -> int:
    """Bytes that a row's codes have to themselves in the main part; 0 where they share some, and
    for a scheme that does not snap."""
    main, rows, encoder = scheme.main, math.prod(scheme.shape[:-1]), _encoder(scheme)
    found = 0
    if scheme.snaps:
        found = scheme.columns * scheme.bits // 8
    elif encoder is not None and encoder.strip == 1:
        found = encoder.sizes[_main_role(scheme)]
    return found if found % main.itemsize == 0 and found * rows == main.nbytes else 0


def _encoder(scheme: Scheme) -> GridEncoder | None:
    """What writes a scheme whose scales stay, if it takes any rows by themselves."""
    encoder = encoder_of(scheme)
    return encoder if isinstance(encoder, GridEncoder) and encoder.group == 1 else None


def _main_role(scheme: Scheme) -> str:
    return next(iter(scheme.parts))
