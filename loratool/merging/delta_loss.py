"""How much of its delta a merge would keep where weights are quantised again, from a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loratool.errors import BaseError
from loratool.merging.counts import Counts, KeptOfDelta
from loratool.merging.plan import Plan
from loratool.merging.requantised import Again, PartAgain
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.words import percent

#: Blocks that are looked at.
_SAMPLES = 48
#: Weights that are looked at where each is read whole for it.
_FEW = 6
#: Bits of a code up to which quantising again loses most of a usual delta.
_FEW_BITS = 4
#: The share of the delta below which a user is warned.
_ENOUGH = 0.9


def sample_kept(plan: Plan, of_few_bits: bool = False) -> KeptOfDelta | None:
    """What quantising again would leave of the delta; None where nothing is, or nothing changes.

    `of_few_bits` looks at formats of few bits alone. Tensors that are not on this disk are fetched,
    those of one file.
    """
    parts = [
        job.source
        for job in plan.jobs
        if isinstance(job.source, PartAgain)
        and job.source.is_codes
        and not (of_few_bits and job.source.weight.stored_as.bits > _FEW_BITS)
    ]
    if not parts:
        return None
    if not all(file.is_file() for part in parts for file in part.files):
        parts = [part for part in parts if part.files == parts[0].files]
        plan.base.fetch({part.weight.name for part in parts})
    counts = Counts()
    with FilePool() as files:
        for part, rows in _places(parts):
            values, count = Again(part, files), math.prod(part.weight.shape[:-1])
            for low in sorted({row // values.step * values.step for row in rows}):
                values.encoded(low, min(low + values.step, count), counts)
    return counts.kept_of_delta


def _places(parts: Sequence[PartAgain]) -> Iterator[tuple[PartAgain, list[int]]]:
    """Rows spread evenly over all weights together."""
    if any(_is_read_whole(part) for part in parts):
        parts = parts[:: -(-len(parts) // _FEW)]
    spacing = max(1, sum(part.weight.numel for part in parts) // _SAMPLES)
    end = 0
    for part in parts:
        begin, end = end, end + part.weight.numel
        found = range(-(-begin // spacing) * spacing, end, spacing)
        yield part, [(place - begin) // part.weight.shape[-1] for place in found]


def _is_read_whole(part: PartAgain) -> bool:
    """Whether nothing is known of a row before all rows are."""
    encoder = encoder_of(part.weight.stored_as)
    leads = encoder is not None and encoder.lead is not None
    return leads or any(taken.how != "given" for taken in part.job.taken)


def refuse_loss(plan: Plan) -> None:
    """Raise BaseError where weights of few bits would be quantised again, with what is left of the
    delta."""
    kept = sample_kept(plan, of_few_bits=True)
    if kept is not None and plan.treatment is not None:
        raise BaseError(
            f"{plan.base.label} is quantised ({plan.treatment.base.title}). Quantised again, "
            f"merged weights would keep {_about(kept)}.",
            "--quantised plain or keep loses nothing of it. To have this format: merge into the "
            "16-bit original and quantise the result. --force quantises again all the same.",
        )


def note_loss(kept: KeptOfDelta | None, plan: Plan) -> list[Notice]:
    """A warning where little of the delta is kept."""
    if kept is None or kept.share >= _ENOUGH:
        return []
    text = (
        f"Quantising again keeps {_about(kept)}. --quantised keep leaves adapted weights plain, "
        "and loses nothing of it."
    )
    return [Notice("delta-lost", text, plan.base.label)]


def _about(kept: KeptOfDelta) -> str:
    return f"about {percent(kept.share)} of the delta (error {percent(kept.error)})"
