"""Is a weight the merged one, quantised again as the base is? Then its bytes are known.

Others quantise the same sums: their codes are those, but for values half way between two, and
their scales may be rounded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loratool.merging.proof.findings import Finding
from loratool.merging.requantised import parts_again
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.scheme import QuantisedTensor, quantised
from loratool.storage.tensors import FilePool, block_elements, blocks
from loratool.storage.values import same_bytes, values_of
from loratool.streams.run import Run

if TYPE_CHECKING:
    from loratool.merging.proof.checking import Pair

#: Of the codes that a merge moves, the share that may be otherwise.
_MISSED = 0.05
#: The codes that it must move at least, and the share of all, to tell it from what did not happen.
_FEWEST, _LEAST = 20, 0.002
#: How far values may be off by other scales and the codes that are otherwise, as a share of ‖W‖.
_OFF = 0.03


def look_for_quantised_again(
    findings: list[Finding], pairs: Sequence[Pair], base: Checkpoint, run: Run
) -> list[Finding]:
    """Where an adapted weight is not as expected, and is stored as in the base, ask whether the
    expected one is so when it is quantised again."""
    if not isinstance(base, Dequantised):
        return findings
    unlike = {f.tensor for f in findings if f.adapted and not f.sound}
    asked = {
        pair.job.name: pair
        for pair in pairs
        if pair.job.name in unlike
        and pair.job.name in base.weights
        and _stored_alike(base.weights[pair.job.name], pair)
    }
    proven = {
        name for name, pair in asked.items() if _is_again(base.weights[name], pair, run.silent())
    }
    return [replace(f, code="requantised") if f.tensor in proven else f for f in findings]


def _stored_alike(weight: QuantisedTensor, pair: Pair) -> bool:
    """Whether a merged weight has the base's form, and what stays of its parts."""
    there, encoder = pair.merged, encoder_of(weight.stored_as)
    if not isinstance(there, QuantisedTensor) or encoder is None:
        return False
    old, new = weight.stored_as.parts, there.stored_as.parts
    return (
        type(there.stored_as) is type(weight.stored_as)
        and there.shape == weight.shape
        and old.keys() == new.keys()
        and all((old[r].dtype, old[r].shape) == (new[r].dtype, new[r].shape) for r in old)
        and all(same_bytes(old[r], new[r]) for r in old if r not in encoder.sizes)
    )


def _is_again(weight: QuantisedTensor, pair: Pair, run: Run) -> bool:
    from loratool.merging.proof.checking import measure  # torch: about two seconds to import

    there = pair.merged
    assert isinstance(there, QuantisedTensor)
    old, new = weight.stored_as, there.stored_as
    jobs = {job.name: job for job in parts_again(weight, pair.job)}
    changed = {role: part for role, part in old.parts.items() if part.name in jobs}
    made = [replace(pair, job=jobs[p.name], merged=new.parts[r]) for r, p in changed.items()]
    stats = measure(made, run)
    unlike = {name: found.elements - found.equal for name, found in stats.items()}
    if old == new and not any(unlike.values()):
        return True
    codes = replace(pair, job=jobs[old.main.name], merged=old.main)
    found = measure([codes], run)[old.main.name]
    moved = found.elements - found.equal
    if moved < max(_FEWEST, _LEAST * found.elements) or unlike[old.main.name] > _MISSED * moved:
        return False
    sources = {role: jobs[part.name].source for role, part in changed.items()}
    expected = quantised(weight.name, replace(old, parts={**old.parts, **sources}))
    return _distance(expected, there) <= _OFF


def _distance(one: QuantisedTensor, other: QuantisedTensor) -> float:
    """‖one − other‖/‖one‖."""
    apart = whole = 0.0
    with FilePool() as files:
        first, second = values_of(one, files), values_of(other, files)
        for low, high in blocks(first.length, block_elements(one.shape[-1])):
            values = first.floats(low, high).astype(np.float64)
            apart += float(np.sum((values - second.floats(low, high)) ** 2))
            whole += float(np.sum(values**2))
    return math.sqrt(apart / whole) if whole else math.inf
