"""Where a decomposition is chance: singular values that are equal within rounding.

The singular vectors of equal values are any rotation of each other. A cut between such values keeps
what the last bits, the number of threads or the order of the adapters happened to put first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loratool.linalg.lowrank import Float64

#: Half a unit in the last place of float32, as a share; all factors are read as float32.
SINGLE = 2.0**-24

#: Rounding of factors moves singular values by less than so many times their rounding.
_MOVED = 4

#: As many values within the rounding of half precision are no coincidence. It is so coarse that two
#: or three may well be, in a spectrum that falls slowly, and little depends on them.
_RUN = 4

#: Values whose square is below this share of all are not worth a word.
_LITTLE = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """Singular values, largest first, `[n]`; `rounding` is that of the numbers they come from:
    half a unit in the last place as a share, 2⁻²⁴ for float32."""

    values: Float64
    rounding: float = SINGLE

    def is_chance_at(self, kept: int) -> bool:
        """Whether a cut to the first `kept` parts values that are equal within rounding."""
        if not 0 < kept < len(self.values) or not self._matters(kept):
            return False
        within = self._equal(kept - 1)
        return bool(within[kept]) and int(np.count_nonzero(within)) >= self._least

    @property
    def has_equals(self) -> bool:
        """Whether any of the values are equal within rounding, so that their directions are free
        to turn."""
        return any(
            np.count_nonzero(self._equal(place)) >= self._least
            for place in range(len(self.values) - 1)
            if self._matters(place + 1) and self._equal(place)[place + 1]
        )

    @property
    def _least(self) -> int:
        return 2 if self.rounding <= SINGLE else _RUN

    def _equal(self, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        value = self.values[place]
        return np.asarray(np.abs(self.values - value) <= _MOVED * self.rounding * value)

    def _matters(self, place: int) -> bool:
        return float(self.values[place] ** 2) > _LITTLE * float(np.sum(self.values**2))
