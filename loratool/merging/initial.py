"""Which parts of the base an initialisation changed before training: PiSSA, OLoRA and their kin.

Such an adapter was trained on W' = round(W - C), in the base's own dtype. C is what the base alone
tells (`derivation`), or what the adapter before training holds, `scale·B·A`. A plan notes for each
weight which of the two it is; numbers come later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import same_adapter
from loratool.adapters.weighting import Weight
from loratool.errors import AdapterError, MatchError, listed
from loratool.merging.match import Delta, Match
from loratool.merging.matching import match
from loratool.merging.plan import Edits, Plan, Taken
from loratool.models.layouts.layout import Layout
from loratool.notices import Notice
from loratool.words import counted

#: What follows from the base alone.
DERIVED = ("pissa", "olora")

_CONVERT = (
    "With PEFT it becomes an ordinary adapter, which takes any weight beside any other: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)


@dataclass(frozen=True)
class Derivation:
    """What it costs to derive what `how` took off the base: `flops` in float64, for `matrices`.

    `seconds` is what that takes on this machine, about; None where nobody asked.
    """

    how: str
    matrices: int
    flops: float
    seconds: float | None = None


def derivation_of(plan: Plan) -> Derivation | None:
    """The cost of a plan's decompositions; None where it has none.

    PiSSA: the Gram matrix of the smaller side n, 2·n²·m, and all its eigenvectors, 9·n³ (Golub and
    Van Loan, 8.3). OLoRA: r columns orthogonalised, and their products with all.
    """
    derived = [taken for job in plan.weight_jobs for taken in job.taken if taken.how in DERIVED]
    if not derived:
        return None
    flops = 0.0
    for taken in derived:
        small, large = sorted(taken.delta.factors.shape)
        rank = taken.delta.factors.rank
        if taken.how == "pissa":
            flops += 2.0 * small**2 * large + 9.0 * small**3
        else:
            flops += 2.0 * small * large * rank + 4.0 * large * rank**2
    return Derivation(derived[0].how, len(derived), flops)


def takings(
    plan: Plan, matches: Sequence[Match], layout: Layout, edits: Mapping[str, Edits]
) -> Iterator[Taken]:
    """What was taken off each weight of the base before training.

    Raises AdapterError or MatchError where that is not defined.
    """
    index = changing_adapter(plan.adapters, plan.weights, plan.initial)
    if index is None:
        return
    found = matches[index]
    how, label = found.adapter.declared.changed_base, found.adapter.label
    if how == "loftq":
        text = (
            f"{label} was trained on a quantised copy of the base (LoftQ). The merge puts what "
            "training changed on the base as it is, which is another model than that in training "
            "by what quantisation took."
        )
        plan.notices.append(Notice("loftq-base", text, label))
    if plan.initial is not None:
        yield from _given(plan.initial, found, layout)
        return
    for delta in found.deltas:
        # What PEFT saved of a base layer is already what the initialisation left of it; and it
        # leaves embeddings alone.
        if edits[delta.tensor].replacement is None and delta.factors.kind != "embedding":
            _refuse_underivable(how, delta, layout)
            yield Taken(how, delta)


def changing_adapter(
    adapters: Sequence[Adapter], weights: Sequence[Weight], initial: Adapter | None
) -> int | None:
    """Which adapter's initialisation changed the base; None where none did.

    Raises AdapterError where several did, and for a weight: neither has a meaning then.
    """
    changing = [i for i, adapter in enumerate(adapters) if adapter.declared.changed_base]
    if not changing and initial is not None:
        # A config may well say nothing: PiSSA's own scripts write init_lora_weights=True.
        changing = list(range(len(adapters)))
        if len(changing) > 1:
            raise AdapterError(
                f"{initial.label} (--initial) could be the beginning of any of "
                f"{counted(len(adapters), 'adapter')}: no config says whose initialisation changed "
                "the base.",
                "Merge that one alone.",
            )
    if not changing:
        return None
    if len(changing) > 1:
        raise AdapterError(
            "Each of these adapters was trained on a base of its own, which its initialisation "
            f"made:\n{listed(adapters[i].label for i in changing)}",
            f"Merge one of them alone. {_CONVERT}",
        )
    index = changing[0]
    if not weights[index].is_one:
        raise AdapterError(
            f"{adapters[index].label}: weight {weights[index]} has no meaning for an adapter "
            "whose initialisation changed the base: its factors hold a part of the base too.",
            _CONVERT,
        )
    return index


def _given(initial: Adapter, trained: Match, layout: Layout) -> Iterator[Taken]:
    """The factors before training, each in the place where the trained ones go."""
    label = trained.adapter.label
    if same_adapter(initial, trained.adapter):
        raise MatchError(
            f"{initial.label} (--initial) is the same adapter as {label}.",
            "Give the adapter as it was saved before training.",
        )
    before = {(d.place, d.factors.path): d for d in match(initial, layout).deltas}
    after = {(d.place, d.factors.path): d for d in trained.deltas}
    unlike = [path for _, path in before.keys() ^ after.keys()]
    for key in before.keys() & after.keys():
        one, other = before[key].factors, after[key].factors
        if (one.rank, one.scale) != (other.rank, other.scale):
            unlike.append(
                f"{other.path}: rank {one.rank} and scale {one.scale} before training, "
                f"{other.rank} and {other.scale} after"
            )
    if unlike:
        raise MatchError(
            f"{initial.label} (--initial) is not {label} before training. Not the same in both:\n"
            f"{listed(sorted(set(unlike)))}",
            "Give the adapter that was saved before this training began.",
        )
    if trained.adapter.declared.changed_base == "olora":
        turned = next((place.tensor for place, _ in after if place.transposed), None)
        if turned is not None:
            raise MatchError(
                f"{turned} is stored [in, out], and there PEFT's OLoRA takes another product off "
                "the base than that of its factors.",
                "Merge without --initial: it is derived from the base as PEFT does it.",
            )
    for key in after:  # in the order of the file
        yield Taken("given", before[key])


def _refuse_underivable(how: str, delta: Delta, layout: Layout) -> None:
    """Raise MatchError for weights whose part PEFT takes otherwise, or not at all."""
    factors, tied = delta.factors, layout.tied
    info = layout.base.tensors.get(delta.tensor)
    reason = ""
    if tied is not None and delta.tensor in (tied.head, tied.embedding):
        reason = "the base shares this matrix between embedding and head, and both changed"
    elif factors.kind != "linear" or delta.place.expert is not None:
        reason = "PEFT initialises whole linear layers that way"
    elif info is not None and info.dtype == "F64":
        reason = "it is F64, and PEFT initialises float32, float16 and bfloat16 that way"
    elif info is not None and delta.place.shape(info.shape) != factors.shape:
        reason = "the layer lies in several tensors of the base"
    elif factors.parts.keys() != {"A", "B"}:
        reason = "its factors are no pair A and B"
    if reason:
        raise MatchError(
            f"{factors.path}: what {how} took off this weight is not derived: {reason}.",
            "Give the adapter as it was before training: --initial ADAPTER.",
        )
