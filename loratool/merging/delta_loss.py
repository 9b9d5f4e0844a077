"""How much of its delta a merge would keep where weights are quantised again, from a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from loratool.errors import BaseError
from loratool.merging.counts import Counts, KeptOfDelta
from loratool.merging.plan import Plan
from loratool.merging.requantised import Again, PartAgain
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.streams.run import Run
from loratool.words import percent

#: Blocks that are looked at.
_SAMPLES = 48
#: Weights that are looked at where each has to be decomposed.
_FEW = 6
#: Bits of a code up to which quantising again loses most of a usual delta.
FEW_BITS = 4
#: The share of the delta below which a user is warned.
ENOUGH = 0.9


def sample_kept(plan: Plan, run: Run, of_few_bits: bool = False) -> KeptOfDelta | None:
    """What quantising again would leave of the delta; None where nothing is, or nothing changes.

    `of_few_bits` looks at formats of few bits alone. Tensors that are not on this disk are fetched,
    those of one file.
    """
    parts = [
        job.source
        for job in plan.jobs
        if isinstance(job.source, PartAgain)
        and job.source.is_codes
        and not (of_few_bits and job.source.weight.stored_as.bits > FEW_BITS)
    ]
    if not parts:
        return None
    if not all(file.is_file() for part in parts for file in part.files):
        parts = [part for part in parts if part.files == parts[0].files]
        plan.base.fetch({part.weight.name for part in parts})
    from loratool.streams.workers import Workers  # torch: about two seconds to import

    total = Counts()
    with FilePool() as files, Workers(run.threads) as workers:
        for counts in workers.in_order(_calls(parts, files)):
            total += counts
    return total.kept_of_delta


def _calls(parts: Sequence[PartAgain], files: FilePool) -> Iterator[Callable[[], Counts]]:
    for part, rows in _places(parts):
        values, count = Again(part, files, is_sample=True), math.prod(part.weight.shape[:-1])
        for low in sorted({row // values.step * values.step for row in rows}):
            yield partial(_counted, values, low, min(low + values.step, count))


def _counted(values: Again, first: int, last: int) -> Counts:
    counts = Counts()
    values.encoded(first, last, counts)
    return counts


def _places(parts: Sequence[PartAgain]) -> Iterator[tuple[PartAgain, list[int]]]:
    """Rows spread evenly over all weights together."""
    if any(taken.how != "given" for part in parts for taken in part.job.taken):
        parts = parts[:: -(-len(parts) // _FEW)]  # each is decomposed for it
    spacing = max(1, sum(part.weight.numel for part in parts) // _SAMPLES)
    end = 0
    for part in parts:
        begin, end = end, end + part.weight.numel
        found = range(-(-begin // spacing) * spacing, end, spacing)
        yield part, [(place - begin) // part.weight.shape[-1] for place in found]


def refuse_loss(plan: Plan, run: Run) -> None:
    """Raise BaseError where weights of few bits would be quantised again, with what is left of the
    delta."""
    kept = sample_kept(plan, run, of_few_bits=True)
    if kept is not None and plan.treatment is not None:
        raise BaseError(
            f"{plan.base.label} is quantised ({plan.treatment.base.title}). Quantised again, "
            f"merged weights would keep {_about(kept)}.",
            "--quantised plain or keep loses nothing of it. To have this format: merge into the "
            "16-bit original and quantise the result. --force quantises again all the same.",
        )


def note_loss(kept: KeptOfDelta | None, plan: Plan) -> list[Notice]:
    """A warning where little of the delta is kept."""
    if kept is None or kept.share >= ENOUGH:
        return []
    text = (
        f"Quantising again keeps {_about(kept)}. --quantised keep leaves adapted weights plain, "
        "and loses nothing of it."
    )
    return [Notice("delta-lost", text, plan.base.label)]


def _about(kept: KeptOfDelta) -> str:
    return f"about {percent(kept.share)} of the delta (error {percent(kept.error)})"
