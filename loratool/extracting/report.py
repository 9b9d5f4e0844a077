"""What `extract` reports: the values, and how they follow from what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.answers import Answer
from loratool.extracting.quantised_sides import quantising_share, title_of
from loratool.extracting.selection import ON_REQUEST
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice, document
from loratool.streams.shares import SharedOut

if TYPE_CHECKING:
    from loratool.extracting.decomposed import Decomposed
    from loratool.extracting.outcome import Outcome

#: A share below which an adapter can hardly stand for its fine-tune.
_LITTLE = 0.3


@dataclass(frozen=True)
class ExtractedModule:
    """One module whose difference became factors, or would.

    `shape` is `(out, in)`. `norm` is ‖Δ‖ and `relative` ‖Δ‖/‖W‖. `kept` is the share of ‖Δ‖² in
    the factors, `error` ‖Δ - B·A‖/‖Δ‖, and no factors of this rank have an error below
    `best_error`. `noise` is ‖·‖ of what storing the tuned weights rounded off, over ‖Δ‖, and
    `rounding` what the factors' dtype adds to the error. `stable_rank` is ‖Δ‖²/σ₁². A dry run
    knows neither `rank` nor what depends on it. A stack of experts is one module, with the `shape`
    and the rank of one expert and all else of all of them: their k-th singular values are one, the
    root of the sum of their squares.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    norm: float
    relative: float | None
    noise: float
    rank: int | None = None
    kept: float | None = None
    error: float | None = None
    best_error: float | None = None
    rounding: float | None = None
    stable_rank: float | None = None
    singular_values: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape)}


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that changed and is no pair of factors: saved whole, or left out.

    `why` it was left out: "excluded" by the user, "unasked" for norms, biases and embeddings that
    nobody asked for, "rounding" where the change is nothing else; "" for what is saved.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    norm: float | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape)}


@dataclass(frozen=True)
class GroupShare:
    """The norms, biases or embeddings that changed: how many, their bytes, their share of
    ‖tuned - base‖².

    `saved` of them are in the adapter, whole or as factors, and `unasked` are not because nobody
    asked for them. With all of them the error is
    `error_with`, with none `error_without`. A dry run does not know them, and of embeddings that
    would be factors only their decomposition tells `error_with`.
    """

    group: str
    tensors: int
    saved: int
    unasked: int
    nbytes: int
    share: float
    error_with: float | None
    error_without: float | None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(repr=False)
class ExtractReport(Answer):
    """What the adapter holds of the fine-tune.

    `held` is the share of ‖tuned - base‖² over all tensors that both models have, in factors or
    whole; `error` is √(1 - held), and no adapter of these ranks is below `best_error`. `noise` is
    what storing the tuned weights rounded off, over ‖tuned - base‖, and `rounding` what the
    factors' dtype adds. `base_quantised` and `tuned_quantised` say what the two are quantised as,
    "" where they are not, and `quantising` is the part of `noise` that comes of it. `groups` are
    the norms, biases and embeddings that changed. `verified` is the error of base + adapter as read
    back. `proposals` are the sizes of the file by rank, of a dry run; `held_by_rank` is what one
    rank for all would hold.
    """

    ROWS = "modules"

    base: str
    tuned: str
    output: str
    dtype: str
    dry_run: bool
    rank: int | None
    uniform: bool
    modules: list[ExtractedModule]
    saved: list[OtherTensor]
    left: list[OtherTensor]
    groups: list[GroupShare]
    unchanged: int
    norm: float
    held: float | None
    error: float | None
    best_error: float | None
    noise: float
    quantising: float
    rounding: float | None
    base_quantised: str
    tuned_quantised: str
    bytes_tuned: int
    bytes_written: int
    proposals: dict[int, int] = field(default_factory=dict)
    held_by_rank: dict[int, float] = field(default_factory=dict)
    verified: float | None = None
    #: How far the output is, where this run was one of several workers.
    share: SharedOut | None = None
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        lists = ("saved", "left", "groups")
        others: dict[str, Any] = {n: [t.to_dict() for t in getattr(self, n)] for n in lists}
        if self.share is not None:
            others["share"] = self.share.to_dict()
        return {**document(self, "modules", "warnings"), **others}


def report_of(
    base: Checkpoint,
    tuned: Checkpoint,
    held: Outcome,
    output: Path | None,
    dtype: str,
    dry_run: bool,
    uniform: bool,
) -> ExtractReport:
    ranks: list[int | None] = [None] * len(held.factors) if dry_run else list(held.ranks)
    modules = [_module(f, r) for f, r in zip(held.factors, ranks, strict=True)]
    energy = held.total
    known = not dry_run and energy > 0
    cut, least = held.lost if known else (0.0, 0.0)
    kept = sum(f.size.energy * (m.kept or 0) for f, m in zip(held.factors, modules, strict=True))
    rounded = sum(
        f.size.energy * (m.kept or 0) * (m.rounding or 0) ** 2
        for f, m in zip(held.factors, modules, strict=True)
    )
    report = ExtractReport(
        base=base.label,
        tuned=tuned.label,
        output=str(output or ""),
        dtype=dtype,
        dry_run=dry_run,
        rank=max(held.ranks, default=None),
        uniform=len(set(held.ranks)) == 1 or uniform,
        modules=modules,
        saved=[_other(f) for f in held.whole],
        left=[_other(f, _why(f)) for f in held.left],
        groups=_groups(held, ranks, known),
        unchanged=held.unchanged,
        norm=math.sqrt(energy),
        held=max(0.0, 1 - cut / energy) if known else None,
        error=math.sqrt(cut / energy) if known else None,
        best_error=math.sqrt(least / energy) if known else None,
        noise=_noise(held.factors),
        quantising=quantising_share(held.factors),
        base_quantised=title_of(base),
        tuned_quantised=title_of(tuned),
        rounding=math.sqrt(rounded / kept) if kept and dtype != "float32" else None,
        bytes_tuned=tuned.folder.nbytes_of(tuned.files),
        bytes_written=held.nbytes,
        held_by_rank=_held_by_rank(held) if known else {},
        verified=held.verified,
        warnings=held.notices,
    )
    report.warnings += _note_fit(report, held)
    return report


def _note_fit(report: ExtractReport, held: Outcome) -> list[Notice]:
    """What to think of the result, where it is not what people hope for."""
    matrices = [f for f in (*held.factors, *held.left) if f.part.takes_factors]
    weight = math.fsum(f.size.weight for f in matrices)
    # What no rank holds: what quantising rounded off, and what nobody asked for.
    beyond = math.fsum(f.size.quantising for f in (*held.factors, *held.noise))
    beyond += _energy(held.unasked)
    notices = []
    if report.norm**2 > weight:
        text = (
            f"The change is {report.norm / math.sqrt(weight or 1):.2g} times the norm of the "
            "weights; two models that have nothing to do with each other are 1.4 times apart. Is "
            "this the right base?"
        )
        notices.append(Notice("unrelated", text))
    asked = any(tensor.why == "excluded" for tensor in report.left)
    most = 1 - min(1.0, beyond / (report.norm**2 or 1.0))
    if report.held is not None and report.held < _LITTLE * most and not asked:
        text = (
            f"The adapter holds {report.held:.1%} of the change, which is far from low-rank. Try a "
            "higher --rank, or --energy 0.9 --max-rank 256."
        )
        notices.append(Notice("holds-little", text))
    if report.bytes_written > report.bytes_tuned:
        notices.append(Notice("larger-than-model", "The adapter is larger than the model itself."))
    return notices


def _noise(factors: Sequence[Decomposed]) -> float:
    """What storing rounded off, as a share of ‖ΔW‖; a worker's report has no factors."""
    energy = _energy(factors)
    return math.sqrt(math.fsum(f.size.noise for f in factors) / energy) if energy else 0.0


def _held_by_rank(held: Outcome) -> dict[int, float]:
    """`held` of the report if all modules had this rank, where their spectra are known.

    Where a spectrum is known in part, its last values are a little too small.
    """
    lost = _energy(held.left)
    spectra = [(f, np.concatenate([f.values, f.following]) ** 2) for f in held.factors]
    longest = max(len(squares) for _, squares in spectra)
    known = min((len(squares) for f, squares in spectra if f.passes), default=longest)
    found = {}
    for rank in (2**i for i in range(20) if 2**i <= known):
        cut = math.fsum(f.size.energy - float(squares[:rank].sum()) for f, squares in spectra)
        found[rank] = max(0.0, 1 - (cut + lost) / held.total)
    return found


def _module(found: Decomposed, rank: int | None) -> ExtractedModule:
    size, outline = found.size, found.part.filed()[0]
    module = ExtractedModule(
        path=outline.path,
        kind=outline.kind,
        shape=outline.shape,
        norm=math.sqrt(size.energy),
        relative=math.sqrt(size.energy / size.weight) if size.weight else None,
        noise=math.sqrt(size.noise / size.energy),
    )
    if rank is None:
        return module
    cut, least = found.at(rank)
    values = [*found.values.tolist(), *found.following.tolist()]
    return replace(
        module,
        rank=rank,
        kept=max(0.0, 1 - cut / size.energy),
        error=math.sqrt(cut / size.energy),
        best_error=math.sqrt(least / size.energy),
        rounding=found.rounding,
        stable_rank=size.energy / values[0] ** 2,
        singular_values=values,
    )


def _other(found: Decomposed, why: str = "") -> OtherTensor:
    info = found.part.stack.whole if found.part.stack else found.part.tuned
    numbers = found.part.is_comparable and info.is_float
    norm = math.sqrt(found.size.energy) if numbers else None
    return OtherTensor(found.part.name, info.shape, info.nbytes, norm, why)


def _why(found: Decomposed) -> str:
    if found.noise:
        return "rounding"
    return "unasked" if found.part.fate == "unasked" else "excluded"


def _energy(found: Sequence[Decomposed]) -> float:
    return math.fsum(f.size.energy for f in found)


def _groups(held: Outcome, ranks: Sequence[int | None], known: bool) -> list[GroupShare]:
    """What of the groups `ON_REQUEST` changed by more than rounding."""
    lost, total = held.lost[0] if known else 0.0, held.total or 1.0
    groups = []
    for group in ON_REQUEST:
        own = [(f, r) for f, r in zip(held.factors, ranks, strict=True) if f.part.group == group]
        factors = [f for f, rank in own if rank != 0]
        compared = [f for f in held.whole if f.part.group == group and f.part.is_comparable]
        whole = [f for f in compared if f.size.changed]
        left = [f for f in held.left if f.part.group == group and f.part.is_comparable]
        left = [f for f in left if not f.noise] + [f for f, rank in own if rank == 0]
        found = [*factors, *whole, *left]
        if not found:
            continue
        outside = _energy(left)
        inside = _energy(whole) + math.fsum(f.size.energy - f.at(r)[0] for f, r in own if r)
        told = known and not any(f.part.takes_factors for f in left)
        groups.append(
            GroupShare(
                group, len(found), len(factors) + len(whole),
                sum(f.part.fate == "unasked" for f in left),
                sum(f.part.tuned.nbytes for f in found), _energy(found) / total,
                math.sqrt(max(0.0, lost - outside) / total) if told else None,
                math.sqrt((lost + inside) / total) if known else None,
            )
        )  # fmt: skip
    return groups
