"""Where the first answer is not clear: is it the base alone, and which adapter has which weight?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertPair
from loratool.adapters.factors import Factors
from loratool.merging.plan import Job, Plan
from loratool.merging.proof.findings import Finding, Stats, split_by_adapter
from loratool.streams.run import Run

if TYPE_CHECKING:
    from loratool.merging.proof.checking import Pair


def look_for_base(
    findings: list[Finding], pairs: Sequence[Pair], plan: Plan, run: Run
) -> list[Finding]:
    """Where an adapter's saved tensor or rows are not there, ask whether the base's still are."""
    from loratool.merging.proof.checking import Pair, measure  # torch: two seconds to import

    unlike = {f.tensor for f in findings if f.code == "other"}
    again = []
    for pair in pairs:
        source = plan.base.tensors.get(pair.job.name)
        held = pair.job.action == "replace" or pair.job.rows
        fits = source is not None and source.shape == pair.merged.shape
        if pair.job.name in unlike and held and source is not None and fits:
            plain = Job(pair.job.name, pair.job.dtype, source, "copy", checked=False)
            again.append(Pair(plain, pair.merged))
    still = {
        name
        for name, stats in measure(again, run.silent()).items()
        if stats.equal == stats.elements
    }
    return [replace(f, code="not-merged") if f.tensor in still else f for f in findings]


def look_for_adapters(
    findings: list[Finding],
    pairs: Sequence[Pair],
    stats: dict[str, Stats],
    plan: Plan,
    run: Run,
) -> list[Finding]:
    """Where several adapters were not merged as asked, tell their weights apart."""
    from loratool.merging.proof.checking import attribute

    owners = {id(m): a for a in plan.adapters for m in a.modules.values()}
    unclear = {f.tensor: f for f in findings if f.code in ("weight", "other", "damaged")}
    asked = [
        pair
        for pair in pairs
        if pair.job.name in unclear
        and len(pair.job.deltas) > 1
        # One adapter may change several parts of a tensor: then its weights are not one number.
        and len({id(_owner(d.factors, owners)) for d in pair.job.deltas}) == len(pair.job.deltas)
        and not pair.job.taken
        and all(delta.factors.adds for delta in pair.job.deltas)
    ]
    shares = attribute(asked, run)
    for pair in asked:
        name, deltas = pair.job.name, pair.job.deltas
        called = [_owner(delta.factors, owners).name for delta in deltas]
        if len(set(called)) < len(called):
            called = [f"{n} ({i})" for i, n in enumerate(called, 1)]
        share = shares[name]
        weighted = [(n, delta.weight) for n, delta in zip(called, deltas, strict=True)]
        unclear[name] = split_by_adapter(
            unclear[name], weighted, share.weights, share.rest, stats[name]
        )
    return [unclear.get(f.tensor, f) for f in findings]


def _owner(factors: Factors, owners: Mapping[int, Adapter]) -> Adapter:
    """The adapter that factors are of; those of one expert are of a stack."""
    return owners[id(factors.stack if isinstance(factors, ExpertPair) else factors)]
