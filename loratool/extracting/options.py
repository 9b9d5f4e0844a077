"""What `extract` was asked for: which tensors, which ranks, how the factors are computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loratool.dtypes import FACTOR_DTYPES
from loratool.errors import UsageError, unknown
from loratool.extracting.selection import SAVED_ON_REQUEST, Selection
from loratool.linalg.ranks import Criterion, check_patterns
from loratool.paths import GROUPS


@dataclass(frozen=True)
class ExtractOptions:
    """The options of `loratool.extract`, as loratool.json records them. `budget` is in bytes."""

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    uniform: bool = False
    patterns: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    embeddings: bool = False
    dtype: str = "float16"
    exact: bool = False
    keep_noise: bool = False
    seed: int = 0

    @property
    def criterion(self) -> Criterion:
        return Criterion(rank=self.rank, energy=self.energy, max_rank=self.max_rank)

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.skip, self.save, self.embeddings)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def check(self, dry_run: bool) -> None:
        """Raise UsageError for options that contradict each other, and where no rank is given."""
        self.criterion.check()
        if self.dtype not in FACTOR_DTYPES:
            raise unknown("dtype", self.dtype, FACTOR_DTYPES)
        for group in self.skip:
            if group not in GROUPS:
                raise unknown("group", group, GROUPS)
            asked = f"--save {group}" if group in self.save and group in SAVED_ON_REQUEST else ""
            if group == "embeddings" and self.embeddings:
                asked = "--embeddings"
            if asked:
                raise UsageError(
                    f"--skip {group} and {asked} contradict each other.", "Omit one of them."
                )
        check_patterns(self.uniform, self.patterns, "--rank" if self.rank is not None else "")
        given = [*self.criterion.given, *(["budget"] if self.budget is not None else [])]
        if len(given) > 1:
            raise UsageError(
                f"--{given[0]} and --{given[1]} ask for different ranks.", "Give one of them."
            )
        if not given and not dry_run:
            raise UsageError(
                "No rank given.",
                "Say how much to hold: --rank 16, --energy 0.9 or --budget 50MB; --dry-run shows "
                "how much changed.",
            )
        if self.max_rank is not None and (not given or given == ["rank"]):
            raise UsageError(
                "--max-rank goes with --energy or --budget.", "Give one of them, or --rank."
            )
        if self.budget is not None and self.budget < 1:
            raise UsageError("--budget must be above zero.", "Write 50MB.")
