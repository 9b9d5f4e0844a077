"""The plan that takes adapters out of a model by subtraction: a merge with negated weights.

Where originals are at hand they are copied instead, once it is clear that they are the originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.timesweight import is_of_weight
from loratool.adapters.weighting import Weight
from loratool.dtypes import DTYPE_BITS
from loratool.errors import RestoreError, listed
from loratool.merging.plan import Edits, Job, Plan, make_job
from loratool.merging.planning import build_plan
from loratool.merging.proof.findings import judge
from loratool.merging.provenance import merged_into, weights_sha256
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import as_stored, dequantised
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.models.quantised.treatment import Quantised
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo
from loratool.streams.run import Run
from loratool.words import agreeing, counted


@dataclass(frozen=True)
class Subtraction:
    """`plan` subtracts, `forward` would add the same; `originals` are copied, by name."""

    plan: Plan
    forward: Plan
    originals: dict[str, TensorInfo]

    @property
    def is_base(self) -> bool:
        """Whether every tensor of the result is one of the base's files."""
        made = any(isinstance(info, QuantisedTensor) for info in self.originals.values())
        return len(self.originals) == len(self.plan.jobs) and not made


def plan_subtraction(
    merged: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    dtype: str,
    base: str | Path | None,
    record: dict[str, Any],
    run: Run,
) -> Subtraction:
    """Plan `merged - Σ weight·scale·B·A`. Raises RestoreError if `base` holds other originals.

    Weights of `merged` that are quantised again by a merge go back into that format, where what is
    subtracted leaves them nearest to what they were.
    """
    options = record.get("options", {})
    _refuse_other_beginning(merged, adapters, record)
    again = "requantise" if options.get("quantised") == "requantise" else None
    quantised = Quantised(again, trained_here=True)
    how = bool(options.get("allow_unmatched")), options.get("components") or (), None, True
    plan = build_plan(merged, adapters, [-w for w in weights], dtype, *how, quantised)
    forward = build_plan(merged, adapters, weights, dtype, *how, quantised)
    plan.notices = [notice for notice in plan.notices if notice.code != "quantised-base"]
    plan.notices += _note_quantised(plan)
    originals = {}
    if base is not None:
        originals = _originals(base, merged, forward, bool(record), run)
    for shard, jobs in plan.shards.items():
        plan.shards[shard] = [
            _copied(plan, job, originals[job.name]) if job.name in originals else job
            for job in jobs
        ]
        plan.shards[shard].sort(key=lambda job: -DTYPE_BITS[job.dtype])
    return Subtraction(plan, forward, originals)


def _note_quantised(plan: Plan) -> list[Notice]:
    """A warning where what is subtracted may not be there any more."""
    if plan.treatment is None or not plan.treatment.touched:
        return []
    text = (
        f"Adapted weights of {plan.base.label} are quantised ({plan.treatment.base.title}), which "
        "may have taken most of what was merged; all of it is subtracted."
    )
    return [Notice("quantised-base", text, plan.base.label)]


def _copied(plan: Plan, job: Job, original: TensorInfo) -> Job:
    """The job that writes an original. One that is computed of packed codes has no dtype of its own
    that a plain model would hold it in; it gets the subtracted one's."""
    copied = make_job(plan, job.name, original, Edits())
    return replace(copied, dtype=job.dtype) if isinstance(original, QuantisedTensor) else copied


def _refuse_other_beginning(
    merged: Checkpoint, adapters: Sequence[Adapter], record: dict[str, Any]
) -> None:
    """Raise RestoreError where more was done to the base than that deltas were added."""
    if any(adapter.declared.layer_ranges for adapter in adapters):
        raise RestoreError(
            "The merge copied layers of the base, and subtraction does not take copies away.",
            "Keep the base: a merge never changes it.",
        )
    where = merged.directory
    held = [*merged_into(where), *merged_into(where, of_base=True)] if record else []
    taken = {entry.weights_sha256: entry.document.get("taken") for entry in held}
    for adapter in adapters:
        what = taken.get(weights_sha256(adapter)) if taken else None
        if what or (adapter.declared.changed_base and what is None):
            raise RestoreError(
                f"{adapter.label}: its initialisation changed the base, so what is left when its "
                "delta is subtracted is not the base.",
                "The undo file that `loratool merge --reversible` writes takes back all of it.",
            )


def _originals(
    base: str | Path, merged: Checkpoint, forward: Plan, exact: bool, run: Run
) -> dict[str, TensorInfo]:
    """The tensors of `base` that `merged` was made from, checked by merging them again."""
    from loratool.merging.proof.checking import Pair, measure  # torch: about two seconds to import

    model = dequantised(open_checkpoint(base, partial=True), partial=True)
    model.fetch()
    there: dict[str, TensorInfo] = {}
    pairs = []
    for job in forward.jobs:
        if job.of is not None or isinstance(job.source, QuantisedTensor):
            continue  # what became of it in quantisation, originals do not tell
        # Of what is packed in both, the packed tensors are compared and copied.
        packed = forward.treatment is not None and forward.treatment.base.is_part(job.source)
        original = (as_stored(model) if packed else model).tensors.get(job.name)
        now = as_stored(merged).tensors.get(job.name)
        if original is not None and now is not None and original.shape == now.shape:
            held = job.source is not now  # an adapter's tensor, with or without a delta on it
            source = job.source if held else original
            again = replace(job, source=source, dtype=now.dtype, checked=False)
            pairs.append(Pair(again, now))
            there[job.name] = original
    stats = measure(pairs, run.silent())
    findings = [judge(pair.job, stats[pair.job.name]) for pair in pairs]
    # What loratool merged comes out the same again; other tools round otherwise.
    wrong = [f.tensor for f in findings if not f.sound or (exact and f.equal < 1)]
    if wrong or not pairs:
        raise RestoreError(
            f"{base}: {len(wrong)} of its {counted(len(pairs), 'tensor')} "
            f"{agreeing(len(wrong), 'does')} not give those of "
            f"{merged.label} with these adapters:\n{listed(wrong)}"
            if pairs
            else f"{base}: it has no tensor of {merged.label}.",
            "It is another base, or the adapters were merged otherwise: see `loratool verify`.",
        )
    return there


def refuse_irreversible(found: Subtraction, record: dict[str, Any]) -> None:
    """Raise RestoreError for what no subtraction takes back and no original replaces."""
    rescaled, multiplied, replaced, rows = [], [], [], []
    forward = found.forward
    for job in forward.weight_jobs:
        if job.name in found.originals:
            continue
        if not all(delta.factors.adds for delta in job.deltas):
            rescaled.append(job.name)
        if is_of_weight(delta.factors for delta in job.deltas):
            multiplied.append(job.name)
        if not forward.is_of_base(job.source):
            replaced.append(job.name)
        if job.rows:
            rows.append(job.name)
    reasons = []
    for names, what in (
        (rescaled, ("tensor", "was", "rescaled (DoRA)")),
        (multiplied, ("tensor", "was", "multiplied (W + s·B·A·W)")),
        (replaced, ("tensor", "was", "replaced or added whole")),
        (rows, ("embedding", "has", "rows that were replaced")),
    ):
        if names:
            noun, verb, rest = what
            reasons.append(f"{counted(len(names), noun, verb)} {rest}, such as {names[0]}")
    added = record.get("result", {}).get("tensors", {}).get("add", 0)
    if added:
        reasons.append(f"the merge added {counted(added, 'tensor')} that the base does not have")
    if reasons:
        raise RestoreError(
            f"{found.plan.base.label}: this cannot be taken back by subtraction:\n"
            f"{listed(reasons)}",
            "The undo file that `loratool merge --reversible` writes takes back all of it.",
        )
