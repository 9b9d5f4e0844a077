"""Where quantisation explains what was found: of the merged weight, or of the base.

A weight that was merged and quantised again as the base is has bytes that are known; one that
others quantised is nearest to the merged one on its own grid. How much of the delta either holds is
another question. And where the base is quantised, others merge into the model it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratool.merging.delta_loss import ENOUGH, FEW_BITS
from loratool.merging.proof.findings import Finding, Stats
from loratool.merging.requantised import parts_again
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_bytes
from loratool.streams.run import Run
from loratool.words import percent

if TYPE_CHECKING:
    from loratool.merging.proof.checking import Pair


def look_for_quantised_again(
    findings: list[Finding],
    pairs: Sequence[Pair],
    stats: dict[str, Stats],
    base: Checkpoint,
    run: Run,
) -> list[Finding]:
    """Where a weight is not as expected and is quantised, ask whether the expected one is so when
    it is quantised, and how much of the delta that leaves."""
    from loratool.merging.proof.grids import on_own_grid  # torch: about two seconds to import

    unlike = {f.tensor for f in findings if not f.sound}
    asked = [
        pair
        for pair in pairs
        if pair.job.name in unlike and isinstance(pair.merged, QuantisedTensor)
    ]
    proven = _as_the_base_is([pair for pair in asked if pair.job.is_sum], base, run)
    near = on_own_grid([pair for pair in asked if pair.job.name not in proven], run.silent())
    proven |= {name for name, found in near.items() if not found.outside}
    codes: dict[str, tuple[str, str]] = {}
    untouched = {pair.job.name for pair in asked if not pair.job.is_adapted} & proven
    few = {pair.job.name for pair in asked if _bits(pair.merged) <= FEW_BITS} & proven - untouched
    for names in (few, proven - untouched - few):
        delta = sum(stats[name].delta for name in names)
        share = sum(stats[name].along for name in names) / delta if delta > 0 else 0.0
        # Of more bits it is a question of precision, as with any other dtype.
        code = "delta-lost" if names <= few and share < ENOUGH else "requantised"
        codes |= dict.fromkeys(names, (code, percent(max(0.0, share))))
    codes |= dict.fromkeys(untouched, ("same-quantised", ""))
    return [_told(finding, *codes.get(finding.tensor, ("", ""))) for finding in findings]


def _bits(info: TensorInfo) -> int:
    return info.stored_as.bits if isinstance(info, QuantisedTensor) else 0


def _told(finding: Finding, code: str, note: str) -> Finding:
    return replace(finding, code=code, note=note) if code else finding


def look_for_original(
    findings: list[Finding], pairs: Sequence[Pair], stats: dict[str, Stats], run: Run
) -> list[Finding]:
    """Where weights of a quantised base are plain and otherwise than expected, ask whether they are
    those of the model that the base was quantised from."""
    from loratool.merging.proof.grids import on_grid_of_base  # torch: about two seconds to import

    unlike = {f.tensor for f in findings if f.code in ("other", "changed", "weight")}
    asked = [
        pair
        for pair in pairs
        if pair.job.name in unlike and not isinstance(pair.merged, QuantisedTensor)
    ]
    # A small change of what is on the grid would be as near, but hardly anything of it far away.
    of_original = {
        name
        for name, near in on_grid_of_base(asked, run.silent()).items()
        if 1000 * near.outside <= near.elements and 3 * near.doubled >= near.elements
    }
    adapted = {pair.job.name for pair in asked if pair.job.is_adapted} & of_original
    if not _is_merged([stats[name] for name in adapted]):
        of_original -= adapted
    return [replace(f, code="original") if f.tensor in of_original else f for f in findings]


def _is_merged(stats: Sequence[Stats]) -> bool:
    """Whether the delta is in what differs from the base beside much else, all of it together."""
    delta, along = sum(s.delta for s in stats), sum(s.along for s in stats)
    change, elements = sum(s.change for s in stats), sum(s.elements for s in stats)
    if not delta > 0 or not math.isfinite(change):
        return False
    # What quantising took off is not along the delta but by chance.
    chance = math.sqrt(change / (elements * delta))
    return chance < 0.2 and abs(along / delta - 1) < 0.2 + chance


def _as_the_base_is(pairs: Sequence[Pair], base: Checkpoint, run: Run) -> set[str]:
    """The names of the weights that are, byte for byte, the merged ones quantised as the base."""
    from loratool.streams.workers import Workers  # torch: about two seconds to import

    weights = base.weights if isinstance(base, Dequantised) else {}
    parts = [
        (pair.job.name, _changed_parts(pair, weights[pair.job.name]))
        for pair in pairs
        if pair.job.name in weights
    ]
    calls = ((name, made, there) for name, found in parts for made, there in found)
    unlike: set[str] = set()
    with Workers(run.threads) as workers:
        for name, same in workers.in_order(partial(_named, *call) for call in calls):
            unlike |= set() if same else {name}
    return {name for name, found in parts if found} - unlike


def _named(name: str, made: TensorInfo, there: TensorInfo) -> tuple[str, bool]:
    return name, same_bytes(made, there)


def _changed_parts(pair: Pair, weight: QuantisedTensor) -> list[tuple[TensorInfo, TensorInfo]]:
    """The parts that quantising again makes, each with what is there; none where the weight is
    stored otherwise than in the base, or has other scales where these stay."""
    there = pair.merged
    if not isinstance(there, QuantisedTensor) or there.stored_as != weight.stored_as:
        return []
    old, new = weight.stored_as.parts, there.stored_as.parts
    encoder = encoder_of(weight.stored_as)
    if encoder is None or old.keys() != new.keys():
        return []
    for role, part in old.items():
        if (part.dtype, part.shape) != (new[role].dtype, new[role].shape):
            return []
        if role not in encoder.sizes and not same_bytes(part, new[role]):
            return []
    made = {job.name: job.source for job in parts_again(weight, pair.job)}
    return [(made[old[role].name], new[role]) for role in encoder.sizes]
