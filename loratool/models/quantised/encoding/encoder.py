"""What it is to bring rows of a weight back into the form that it is stored in.

Parts of a weight lie far apart in a file. So each part that changes where the weight does is made
by itself, strip by strip, and nothing of a weight need be held while others are written. The other
parts stay as they are: scales that were calibrated, zero points, tables, descriptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.scheme import Floats
from loratool.storage.tensors import Bytes, FilePool

Codes = npt.NDArray[Any]


class Encoder(ABC):
    """Brings rows of one weight into the form of its scheme.

    A weight of more than two dimensions is seen as one matrix: `[E, R, C]` as `[E·R, C]`. `group`
    is how many rows, from a multiple of it on, are encoded together, without a look at others.
    `strips` are the parts that change, by role, with the bytes that a group has in each; 0 where
    those of a group do not lie together, so that the part is made as a whole.
    """

    group: int
    strips: Mapping[str, int]

    @abstractmethod
    def open(self, files: FilePool) -> None:
        """Read what stays of the parts. Called once, before anything is encoded."""

    @abstractmethod
    def encode(
        self, role: str, first: int, values: Floats, stand_for: Floats | None = None
    ) -> Codes:
        """What rows from `first` on, finite float32 `[n, columns]`, are in the part of this role.

        They are whole groups; the last one of a weight may be short. `stand_for`, of the same
        shape, is filled with the values that are read of the part again; it is given with the
        codes alone, which are the scheme's main part.
        """

    def joined(self, role: str, pieces: Sequence[Codes]) -> Bytes:
        """The bytes that pieces of neighbouring groups come to."""
        return np.ascontiguousarray(np.concatenate(pieces)).reshape(-1).view(np.uint8)


def nearest_level(values: Floats, levels: Floats) -> npt.NDArray[np.uint8]:
    """The number of the level that is nearest to each value; of two as near, the lower one.

    There are at most 256 levels, and they ascend.
    """
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    if len(levels) > 32:
        return np.searchsorted(bounds, values).astype(np.uint8)
    # Comparing with each bound is several times as fast as searching among few.
    found = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, bool)
    for bound in bounds:
        np.greater(values, bound, out=above)
        found += above.view(np.uint8)
    return found


def largest(values: Floats) -> Floats:
    """The largest magnitude along the last axis."""
    found: Floats = np.maximum(values.max(-1), -values.min(-1))
    return found


def inverse(scales: Floats) -> Floats:
    """One divided by each scale; zero for a scale of zero, whose values are all zero."""
    found = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=found, where=scales != 0)
    return found
