"""What `combine` was asked for: the method with its settings, the ranks, whose tensors to take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loratool.combining.extras import CLASHES
from loratool.errors import UsageError, unknown
from loratool.linalg.methods import METHODS, Method
from loratool.linalg.ranks import Criterion

SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class CombineOptions:
    """The options of `loratool.combine`, as loratool.json records them."""

    method: str = "sum"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    saved: str = "refuse"
    keep_patterns: bool = False
    dtype: str | None = None

    @property
    def criterion(self) -> Criterion:
        return Criterion(rank=self.rank, energy=self.energy)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> Method:
        """The method. Raises UsageError for options that contradict it or each other."""
        self.criterion.check()
        name, density, sign = self.method, self.density, self.majority_sign_method
        method = METHODS.get(name)
        if method is None:
            raise unknown("method", name, METHODS)
        if method.prunes and density is None:
            raise UsageError(
                f"--method {name} prunes, so it needs a density.",
                "Give --density, the share of values to keep, e.g. --density 0.5.",
            )
        if density is not None:
            if not method.prunes:
                raise UsageError(f"--method {name} does not prune.", "Omit --density.")
            if not 1e-6 <= density <= 1:
                raise UsageError(
                    f"--density {density:g} is not a share: it must be above 0 (a millionth at the "
                    "least) and at most 1.",
                    "0.5 keeps half of the values.",
                )
        if sign not in SIGNS:
            raise unknown("majority sign method", sign, SIGNS)
        if self.saved not in CLASHES:
            raise unknown("choice of saved tensors", self.saved, CLASHES)
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative.", "Give 0 or more.")
        return method
