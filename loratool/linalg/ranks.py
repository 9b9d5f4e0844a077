"""How many singular values to keep: a number, a share of the energy, kohya's criteria, noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loratool.errors import UsageError, listed
from loratool.linalg.lowrank import Float64
from loratool.linalg.noise import noise_edge
from loratool.notices import Notice

#: More than the width of any layer.
LARGEST_RANK = 1 << 20


def check_rank(option: str, rank: int) -> None:
    """Raise UsageError for what is no rank."""
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise UsageError(
            f"{option} {rank}: a rank is a whole number from 1 to {LARGEST_RANK:,}.",
            "Most adapters have 4 to 256.",
        )


def check_patterns(uniform: bool, patterns: bool, single: str) -> None:
    """Raise UsageError where ranks per module and one rank for all are asked for.

    `single` is an option that was given and means one rank, "" if there is none.
    """
    if patterns and uniform:
        raise UsageError(
            "--uniform and --patterns ask for different ranks.",
            "--patterns gives each module its own; without it all have one.",
        )
    if patterns and single:
        raise UsageError(
            f"{single} gives all modules one rank, and --patterns each its own.",
            "Omit --patterns, or say with --energy how much each module keeps.",
        )


def note_too_wide(rank: int, shapes: Mapping[str, tuple[int, int]]) -> list[Notice]:
    """A warning for a rank that is above what matrices `[out, in]` have, by module path.

    One rank for all is never above what the widest matrix has; the others get zeros.
    """
    widths = {path: min(shape) for path, shape in shapes.items()}
    given = min(rank, max(widths.values()))
    narrow = [f"{path}: {width}" for path, width in widths.items() if width < given]
    lines = []
    if given < rank:
        lines.append(f"No matrix has as much as rank {rank}; all get {given}.")
    if narrow:
        lines.append(f"Rank {given} is more than these have, and zeros fill it up:")
    if not lines:
        return []
    first = next(path for path, width in widths.items() if width < rank)
    text = " ".join(lines) + (f"\n{listed(narrow)}" if narrow else "")
    return [Notice("rank-too-large", text, first)]


@dataclass(frozen=True)
class Criterion:
    """At most one is set beside `max_rank`, which caps what the others ask for.

    - `rank`: this many.
    - `energy` e: the fewest with Σₖσ²/Σσ² ≥ e.
    - `sv_fro` t: the fewest with √(Σₖσ²/Σσ²) ≥ t, so energy t².
    - `sv_cumulative` t: the fewest with Σₖσ/Σσ ≥ t.
    - `sv_ratio` t: those with σ > σ₁/t.
    - `noise`: those above the noise edge (see `linalg.noise`); all where there is none.

    Those of `sv_` are `resize_lora.py` of kohya-ss/sd-scripts as documented there; releases of it
    keep one rank more (fixed by its pull request 2194).
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    max_rank: int | None = None
    noise: bool = False

    def check(self) -> None:
        """Raise UsageError for values out of range and for two criteria at once."""
        for name in ("rank", "max_rank"):
            number = getattr(self, name)
            if number is not None:
                check_rank(_option(name), number)
        for name in ("energy", "sv_fro", "sv_cumulative"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(
                    f"{_option(name)} {share:g} is not a share: it must be above 0 and at most 1.",
                    "Write 0.99 for 99 %.",
                )
        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            raise UsageError(
                f"--sv-ratio {self.sv_ratio:g}: singular values above σ₁/ratio are kept, so the "
                "ratio must be 1 or more.",
                "Try 10 or 100.",
            )
        if len(self.given) > 1:
            raise UsageError(
                f"{' and '.join(map(_option, self.given))} ask for different ranks.",
                "Give one of them; --max-rank caps it."
                if "rank" not in self.given
                else "Give one.",
            )
        if self.rank is not None and self.max_rank is not None:
            raise UsageError("--rank and --max-rank contradict each other.", "Give one of them.")

    @property
    def given(self) -> list[str]:
        """The names of the criteria that are set, but for the cap."""
        names = ("rank", "energy", "sv_ratio", "sv_fro", "sv_cumulative")
        found = [name for name in names if getattr(self, name) is not None]
        return found + ["noise"] * self.noise

    def choose(self, values: Float64, energy: float, shape: tuple[int, int] | None = None) -> int:
        """How many of these singular values (largest first) to keep, at least one.

        `energy` is the sum of all squares, of those too that are negligible and not in `values`.
        `shape` is `(out, in)` of the product that has them, which `noise` needs.
        """
        kept = len(values)
        if self.rank is not None:
            kept = self.rank
        elif self.sv_ratio is not None:
            kept = int(np.count_nonzero(values > values[:1] / self.sv_ratio))
        elif self.sv_cumulative is not None:
            kept = _first_reaching(np.cumsum(values), self.sv_cumulative * float(values.sum()))
        elif self.energy is not None or self.sv_fro is not None:
            share = self.energy if self.energy is not None else (self.sv_fro or 0.0) ** 2
            kept = _first_reaching(np.cumsum(values**2), share * energy)
        elif self.noise:
            assert shape is not None
            kept = noise_edge(values, *shape).above
        if self.max_rank is not None:
            kept = min(kept, self.max_rank)
        return max(1, min(kept, len(values)))


#: Cuts nothing.
EVERYTHING = Criterion()


def spread(values: Sequence[Float64], costs: Sequence[int], budget: int) -> list[int]:
    """The rank of each matrix that keeps the most energy for at most `budget` bytes.

    `values` are singular values, largest first, and `costs` the bytes that one of them takes. The
    ones that keep the most per byte are taken first, which is optimal up to the last of them; a
    cheaper one may still fill what is left.
    """
    gains = [(float(s) ** 2 / costs[i], i) for i, own in enumerate(values) for s in own]
    ranks = [0] * len(values)
    for _, i in sorted(gains, key=lambda gain: (-gain[0], gain[1])):
        if costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return ranks


def _first_reaching(sums: Float64, wanted: float) -> int:
    return int(np.searchsorted(sums, wanted * (1 - 1e-12))) + 1


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
