"""Is a weight the merged one, quantised again as the base is? Then its bytes are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.merging.proof.findings import Finding
from loratool.merging.requantised import parts_again
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.values import same_bytes
from loratool.streams.run import Run

if TYPE_CHECKING:
    from loratool.merging.proof.checking import Pair


def look_for_quantised_again(
    findings: list[Finding], pairs: Sequence[Pair], base: Checkpoint, run: Run
) -> list[Finding]:
    """Where an adapted weight is not as expected, and is stored as in the base, ask whether the
    expected one is so when it is quantised again."""
    from loratool.merging.proof.checking import measure  # torch: about two seconds to import

    if not isinstance(base, Dequantised):
        return findings
    unlike = {f.tensor for f in findings if f.adapted and not f.sound}
    parts = {}
    for pair in pairs:
        weight = base.weights.get(pair.job.name)
        if pair.job.name in unlike and weight is not None:
            parts[pair.job.name] = _changed_parts(pair, weight)
    stats = measure([part for found in parts.values() for part in found], run.silent())
    proven = {
        name
        for name, found in parts.items()
        if found and all(stats[p.job.name].equal == stats[p.job.name].elements for p in found)
    }
    return [replace(f, code="requantised") if f.tensor in proven else f for f in findings]


def _changed_parts(pair: Pair, weight: QuantisedTensor) -> list[Pair]:
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
    jobs = parts_again(weight, pair.job)
    made = {job.name: job for job in jobs}
    return [replace(pair, job=made[old[role].name], merged=new[role]) for role in encoder.sizes]
