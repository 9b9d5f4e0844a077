"""What it is to bring rows of a weight back into the form that it is stored in.

Parts of a weight lie far apart in a file. So each part that changes where the weight does is made
by itself, strip by strip, and nothing of a weight need be held while others are written. The other
parts stay as they are: scales that were calibrated, zero points, tables, descriptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import numpy as np

from loratool.models.quantised.encoding.rounding import Codes
from loratool.models.quantised.scheme import Floats
from loratool.storage.tensors import Bytes, FilePool


class Encoder(ABC):
    """Brings rows of one weight into the form of its scheme.

    A weight of more than two dimensions is seen as one matrix: `[E, R, C]` as `[E·R, C]`. `group`
    is how many rows are encoded without a look at others; `strip`, some groups, how many have their
    bytes side by side in every part that changes: `sizes` says how many bytes that is, by role. The
    last group and the last strip of a weight may be short.
    """

    group: int
    strip: int
    sizes: Mapping[str, int]

    @abstractmethod
    def open(self, files: FilePool) -> None:
        """Read what stays of the parts. Called once, before anything is encoded."""

    @abstractmethod
    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        """What rows from `first` on, finite float32 `[n, columns]`, are in the part of this role.

        They are whole groups. `before` is what the base has there. `stand_for` is filled with the
        values that are read of the part again; it is given with the codes alone, the scheme's main
        part.
        """

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        """The bytes that pieces of neighbouring groups come to: of some strips that are a group
        each, or of one."""
        return np.ascontiguousarray(np.concatenate(list(pieces))).reshape(-1).view(np.uint8)


class LedEncoder(Encoder):
    """An encoder of weights some of which have a part that is of the weight as a whole.

    The part of the role `lead` is one strip then, and the others follow it; None where a weight has
    no such part.
    """

    lead: str | None = None

    @abstractmethod
    def follow(self, raw: Bytes) -> None:
        """Take the bytes of the part that leads, before another one is encoded."""
