"""verify: is a merged model base + adapters?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.answers import Answer
from loratool.errors import TruncatedError, explained_os_errors
from loratool.merging.plan import Plan
from loratool.merging.proof.findings import Finding, Stats, judge
from loratool.merging.proof.quantised_again import look_for_original, look_for_quantised_again
from loratool.merging.proof.second_look import look_for_adapters, look_for_base
from loratool.merging.proof.words import sentences
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.notices import Notice, document
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.verbs.inputs import (
    Source,
    as_list,
    as_texts,
    check_paths,
    check_weights,
)


@dataclass(repr=False)
class VerifyReport(Answer):
    """Whether a merged model is base + adapters, and why not.

    `verdict` is "yes" or "no"; `summary` says it in sentences. `findings` has an entry for every
    adapted tensor and for every other tensor that is not as expected. `equal` is the share of the
    adapted weights that have the once-rounded value, `lost` what rounding took of the delta:
    ‖realised − Δ‖/‖Δ‖ over the modules that are merged.
    """

    ROWS = "findings"

    merged: str
    base: str
    adapters: list[str]
    weights: list[float | str]
    verdict: str
    summary: list[str]
    modules: int
    tensors: int
    untouched: int
    equal: float
    lost: float | None
    bytes_read: int
    findings: list[Finding] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    #: What --include and --exclude left out of each adapter, in their order.
    excluded: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self, "findings", "warnings")


@explained_os_errors()
def verify(
    merged: str | Path,
    base: str | Path,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float | str | Weight] | None = None,
    allow_unmatched: bool = False,
    components: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    told: Told | Sequence[Told] = (),
    expert_b_layout: str | None = None,
    initial: str | Path | None = None,
    replicate_layers: bool = False,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check whether a model on disk is `base` with `adapters` merged into it, whoever merged them.

    Parameters
    ----------
    merged: the model to check: directory or weights file, in any dtype and any split into shards.
    base, adapters, weights, allow_unmatched, components, include, exclude: as for `merge`. What is
        left out has to be as in the base.
    told, expert_b_layout, initial, replicate_layers, ray: as for `merge`.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, tensor name).

    Raises
    ------
    FileError, AdapterError, BaseError, MatchError: it cannot be decided.
    """
    from loratool.merging.proof.checking import measure  # torch: about two seconds to import
    from loratool.merging.proof.pairing import pair_up
    from loratool.verbs.verifying import claimed_plan, measured_in_cluster

    started = time.perf_counter()
    sources = as_list(adapters)
    given = [merged, base, *([] if initial is None else [initial])]
    check_paths(given, sources, "loratool verify MERGED --base BASE ADAPTER")
    run = Run(threads, progress, cluster=ray)
    claim: dict[str, Any] = {
        "merged": merged, "base": base, "adapters": sources,
        "weights": [weight.document for weight in check_weights(weights, sources)],
        "allow_unmatched": allow_unmatched,
        "components": as_texts(components), "include": as_texts(include),
        "exclude": as_texts(exclude), "told": told if isinstance(told, Told) else list(told),
        "expert_b_layout": expert_b_layout,
        "initial": initial, "replicate_layers": replicate_layers,
    }  # fmt: skip
    plan = claimed_plan(**claim)
    for lora in plan.inputs:
        refuse_not_finite(lora)
    report = _report(plan, merged)
    try:
        model = dequantised(open_checkpoint(merged))
        if ray is None:
            plan.base.fetch()
            model.fetch()
    except TruncatedError as error:
        report.summary = [error.message.rstrip(".")]
    else:
        found = pair_up(plan, model)
        report.bytes_read = sum(pair.merged.disk_bytes for pair in found.pairs)
        if ray is None:
            stats = measure(found.pairs, run)
        else:
            stats = measured_in_cluster(found.pairs, run, claim)
        findings = [judge(pair.job, stats[pair.job.name]) for pair in found.pairs]
        if not all(finding.sound for finding in findings):  # a second look is taken here
            plan.base.fetch()
            model.fetch()
        findings = look_for_quantised_again(findings, found.pairs, stats, plan.base, run)
        findings = look_for_base(findings, found.pairs, plan, run)
        findings = look_for_original(findings, found.pairs, stats, run)
        findings = look_for_adapters(findings, found.pairs, stats, plan, run)
        _conclude(report, [*findings, *found.findings], stats)
        report.warnings += model.notices + found.notices
        plan.refuse_changed()
        model.folder.refuse_changed()
    report.seconds = time.perf_counter() - started
    return report


def _report(plan: Plan, merged: str | Path) -> VerifyReport:
    return VerifyReport(
        merged=str(merged),
        base=plan.base.label,
        adapters=[a.label for a in plan.adapters],
        weights=[weight.document for weight in plan.weights],
        verdict="no",
        summary=[],
        modules=sum(job.is_adapted for job in plan.jobs),
        tensors=len(plan.jobs),
        untouched=0,
        equal=0.0,
        lost=None,
        bytes_read=0,
        warnings=list(plan.notices),
        excluded=[list(adapter.left_out) for adapter in plan.adapters],
    )


def _conclude(report: VerifyReport, findings: list[Finding], stats: dict[str, Stats]) -> None:
    """Fill in what the findings come to."""
    report.verdict = "yes" if all(f.sound for f in findings) else "no"
    report.summary = sentences(findings)
    report.untouched = sum(f.sound and not f.adapted for f in findings)
    report.findings = [f for f in findings if f.adapted or not f.sound]
    report.modules = sum(f.adapted for f in findings)
    adapted = [stats[f.tensor] for f in findings if f.adapted and f.tensor in stats]
    elements = sum(s.elements for s in adapted)
    report.equal = sum(s.equal for s in adapted) / elements if elements else 1.0
    sound = [stats[f.tensor] for f in findings if f.sound and f.lost is not None]
    delta, lost = sum(s.delta for s in sound), sum(s.lost for s in sound)
    if delta > 0 and math.isfinite(lost / delta):
        report.lost = math.sqrt(lost / delta)
