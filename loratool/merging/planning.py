"""Make the plan of a merge from headers alone, before any data is read.

Every refusal happens here, so that a plan that exists can be carried out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import check_ranges, note_scales
from loratool.adapters.factors import Factors
from loratool.adapters.weighting import Weight, parse_weight
from loratool.dtypes import DTYPE_BITS
from loratool.errors import AdapterError, MatchError, UsageError, by_cause
from loratool.merging.frozen import refuse_other_frozen
from loratool.merging.initial import takings
from loratool.merging.match import Delta, Match
from loratool.merging.matching import match
from loratool.merging.plan import BiasTerm, Edits, Job, Plan, make_job
from loratool.merging.replication import Replicated, original
from loratool.merging.requantised import jobs_again
from loratool.merging.tying import refuse_unlike_vocabularies, settle_ties
from loratool.models.checkpoint import Checkpoint, refuse_placeholders
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import (
    LABEL_HEAD,
    TOKENS_BY_COLUMN,
    is_vocabulary,
    is_vocabulary_bias,
)
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.treatment import AS_USUAL, Quantised, treat
from loratool.models.tasks import CLASS_ENDS, CLASSIFYING
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_values
from loratool.words import agreeing, counted


def build_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float | str | Weight],
    dtype: str = "float16",
    allow_unmatched: bool = False,
    components: Sequence[str] = (),
    initial: Adapter | None = None,
    as_it_is: bool = False,
    quantised: Quantised = AS_USUAL,
) -> Plan:
    """Plan `W + Σ weight·scale·B·A` for every tensor of `base`.

    `components` are the only parts of the base that adapters may go into, by the beginnings of
    names. Of the adapter whose initialisation changed the base, `initial` is what it was before
    training; with `as_it_is` the base is the changed one already. `quantised` says what becomes of
    a quantised base. Raises BaseError for one that this cannot be done with, AdapterError for an
    adapter that has no merged form, and MatchError where a part of an adapter finds no place
    (unless `allow_unmatched`).
    """
    refuse_placeholders(base)
    given = [parse_weight(weight) for weight in weights]
    plan = Plan(base, list(adapters), given, dtype, allow_unmatched, tuple(components))
    plan.initial = initial
    plan.notices += base.notices
    layout = Layout(base, components)
    matches = []
    for adapter, weight in zip(adapters, given, strict=True):
        check_ranges(adapter, weight)
        _refuse_unmergeable(plan, adapter, as_it_is)
        plan.notices += note_scales(adapter, weight)
        matches.append(match(adapter, layout))
    plan.notices += layout.notices
    _refuse_unmatched(plan, matches)
    _refuse_chained(plan, matches)
    if not as_it_is:
        refuse_other_frozen(matches, layout)
    edits, added = _collect(plan, matches, layout)
    if not as_it_is:
        for taken in takings(plan, matches, layout, edits):
            edits[taken.delta.tensor].taken.append(taken)
    new = settle_ties(plan, layout, edits)
    refuse_unlike_vocabularies(plan, edits)
    _resize_biases(plan, edits)
    _settle_quantisation(plan, edits, quantised)
    _fill_shards(plan, edits, added, new)
    _note_config(plan, edits, added)
    if isinstance(base, Replicated):
        plan.config_changes["layers"] = list(base.order)
    plan.modules = sum(len({d.module for d in m.deltas} | m.computed) for m in matches)
    return plan


#: What of an adapter may be left out with `allow_unmatched`, by the codes of its notices.
_LEFT_OUT = ("unknown-tensors", "half-a-pair")


def _refuse_unmergeable(plan: Plan, adapter: Adapter, as_it_is: bool) -> None:
    tolerated = list(_LEFT_OUT) if plan.allow_unmatched else []
    # What was taken off the base is known then, or off it already.
    settled = ["base-changing-init"] if plan.initial or as_it_is else []
    settled += ["repeated-init"] if as_it_is else []
    if isinstance(plan.base, Replicated):
        settled.append("layer-replication")
    tolerated += settled
    reasons = [n for n in adapter.notices if n.refused and n.code not in tolerated]
    if reasons:
        tolerable = adapter.modules and all(n.code in _LEFT_OUT for n in reasons)
        raise AdapterError(
            f"{adapter.label}: this adapter cannot be merged.\n"
            + "\n".join(f"  [{n.code}] {n.message}" for n in reasons),
            ("--allow-unmatched merges the rest. " if tolerable else "")
            + f"`loratool inspect {adapter.label}` shows what is in it.",
        )
    # The base's config.json settles what the adapter alone leaves open about square weights.
    settled += ["square-conv1d"] if plan.base.model_type else []
    plan.notices += [
        n
        for n in adapter.notices
        if (not n.refused or n.code in tolerated) and n.code not in settled
    ]
    if not (adapter.modules or adapter.functions or adapter.replaced or adapter.token_rows):
        raise AdapterError(
            f"{adapter.label}: the adapter contains no trained tensors.", "Check the file."
        )


def _refuse_unmatched(plan: Plan, matches: list[Match]) -> None:
    lost = [one for m in matches for one in m.unmatched]
    if not lost:
        return
    does = agreeing(len(lost), "does")
    text = f"{counted(len(lost), 'part')} of the adapter {does} not fit the base:\n{by_cause(lost)}"
    placed = sum(len(m.deltas) + len(m.replaced) + len(m.rows) for m in matches)
    if not plan.allow_unmatched or not placed:
        names = ", ".join(
            repr(m.adapter.declared.base_name) for m in matches if m.adapter.declared.base_name
        )
        raise MatchError(
            text,
            (f"The adapter was trained on {names}; check that this is the base. " if names else "")
            + ("--allow-unmatched merges the rest." if placed else "Nothing in it fits."),
        )
    plan.notices.append(Notice("unmatched", text))


def _refuse_chained(plan: Plan, matches: list[Match]) -> None:
    """Raise MatchError where what multiplies or turns a weight is weighted, or meets another change
    of it: the result would depend on an order that nobody gave."""
    for number, (found, weight) in enumerate(zip(matches, plan.weights, strict=True)):
        words = sorted({f.algorithm for f in found.adapter.functions.values()})
        unlike = [p for p in found.adapter.functions if weight.at(p) != 1] if found.computed else []
        if unlike:
            raise MatchError(
                f"{found.adapter.label}: {' and '.join(words)} is no sum, so weight "
                f"{weight.at(unlike[0]):g} has no meaning.",
                "Merge it with weight 1."
                if weight.at(unlike[0]) > 0
                else "The undo file that `loratool merge --reversible` writes takes it back.",
            )
        for other in (*matches[:number], *matches[number + 1 :]):
            touched = {d.tensor for d in other.deltas} | other.replaced.keys()
            both = sorted(found.computed & touched)
            if both:
                raise MatchError(
                    f"{both[0]}: {found.adapter.label} ({' and '.join(words)}) and "
                    f"{other.adapter.label} both change it, and the result depends on the order.",
                    "Merge one, then the other into the result.",
                )


def _collect(
    plan: Plan, matches: list[Match], layout: Layout
) -> tuple[dict[str, Edits], dict[str, TensorInfo]]:
    edits: dict[str, Edits] = defaultdict(Edits)
    added: dict[str, TensorInfo] = {}
    for found, weight in zip(matches, plan.weights, strict=True):
        for delta in found.deltas:
            placed = Delta(delta.place, delta.factors, weight.at(delta.module), delta.rows)
            edits[delta.tensor].deltas.append(placed)
        for name, module in found.biases:
            edits[name].biases.append(_bias_term(module, weight.at(module.path)))
        for name, rows in found.rows:
            taken = {i for other in edits[name].rows for i in other.indices}
            if taken & set(rows.indices):
                raise MatchError(
                    f"{name}: two adapters replace the row of the same token.",
                    "Merge one of them alone.",
                )
            edits[name].rows.append(rows)
        for name, info in found.replaced.items():
            taken_by = edits[name].replacement
            if taken_by is not None and not same_values(taken_by, info):
                raise MatchError(
                    f"{name}: two adapters replace it, with different values.",
                    "Merge one of them alone.",
                )
            edits[name].replacement = taken_by or info
        for name, info in found.added.items():
            if name in added and not same_values(added[name], info):
                raise MatchError(
                    f"{name}: two adapters add it, with different values.",
                    "Merge one of them alone.",
                )
            added.setdefault(name, info)
        if not weight.is_one and (found.replaced or found.added or found.rows):
            plan.notices.append(
                Notice(
                    "weight-not-applied",
                    f"{found.adapter.name} also replaces whole tensors or token rows; its weight "
                    f"{weight} applies to its low-rank part only.",
                )
            )
    for name in edits:
        if layout.shared_alias(name):
            raise MatchError(
                f"{name}: this model shares one matrix between encoder, decoder and head, so a "
                "change of one of them has no place of its own.",
                "Adapt other modules, or merge with --allow-unmatched after removing these.",
            )
    return edits, added


def _bias_term(module: Factors, weight: float) -> BiasTerm:
    assert module.bias is not None
    assert module.scale is not None
    return BiasTerm(module.bias, weight * module.scale)


def _resize_biases(plan: Plan, edits: dict[str, Edits]) -> None:
    """Give the biases of language-model heads the rows of a vocabulary that the adapter resizes.

    Adapters do not hold them. New tokens get a bias of zero, as transformers gives them when it
    resizes a model whose head is its embedding (`resize_token_embeddings`).
    """
    tensors = plan.base.tensors
    resized = {
        name: (tensors[name].shape[0], found.replacement.shape[0])
        for name, found in edits.items()
        if found.replacement is not None and name in tensors and is_vocabulary(name)
        and len(found.replacement.shape) == 2
    }  # fmt: skip
    for old, new in set(resized.values()):
        for name, info in tensors.items():
            if old == new:
                continue
            if name == TOKENS_BY_COLUMN.get(plan.base.model_type):
                raise MatchError(
                    f"The adapter resizes the vocabulary to {new} tokens, but {name} "
                    f"{list(info.shape)} has a column per token and is not in the adapter.",
                    "Save it too when training: modules_to_save.",
                )
            if info.shape != (old,) or not is_vocabulary_bias(name):
                continue
            weight = name.removesuffix("bias") + "weight"
            if weight in tensors and weight not in resized:  # of another part, which stays
                continue
            found = edits.setdefault(name, Edits())
            if found.replacement is None:
                found.replacement = info.resized(new)
                text = (
                    f"{name} has a value per token and is not in the adapter: it goes from {old} "
                    f"to {new} values, zero for new tokens."
                )
                plan.notices.append(Notice("head-bias-resized", text, name))


def _fill_shards(
    plan: Plan, edits: dict[str, Edits], added: dict[str, TensorInfo], new: list[Job]
) -> None:
    """One job per tensor, in the base's order, wide dtypes first so that data stays aligned."""
    again = jobs_again(plan, edits)
    for shard, sources in _sources(plan):
        jobs = [
            again.get(t.name) or make_job(plan, t.name, t, edits.get(t.name, Edits()))
            for t in sources
        ]
        beside = [job for job in new if any(_same_place(job, other) for other in jobs)]
        new = [job for job in new if job not in beside]
        plan.shards[shard] = jobs + beside
    last = list(plan.shards)[-1]
    plan.shards[last] += [make_job(plan, n, info, Edits(), "add") for n, info in added.items()]
    plan.shards[last] += new
    for jobs in plan.shards.values():
        jobs.sort(key=lambda job: -DTYPE_BITS[job.dtype])


def _sources(plan: Plan) -> Iterator[tuple[str, list[TensorInfo]]]:
    """What each output shard begins with."""
    if plan.treatment is not None:
        yield from plan.treatment.sources()
        return
    for shard, names in plan.base.shards.items():
        yield shard, [plan.base.tensors[name] for name in names]


def _settle_quantisation(plan: Plan, edits: dict[str, Edits], quantised: Quantised) -> None:
    """Decide what becomes of a quantised base, now that it is known what changes."""
    base = original(plan.base)
    if not isinstance(base, Dequantised):
        return
    changed = {name for name, found in edits.items() if found}
    asked = quantised.how
    if isinstance(plan.base, Replicated):
        if asked not in (None, "plain"):
            raise UsageError(
                "Copied layers are written as a plain model.", "Omit --quantised, or say plain."
            )
        asked = "plain"
    plan.treatment = treat(base, changed, asked, quantised.trained_here)
    if plan.treatment.how != "plain":
        plan.dtype = "base"


def _same_place(one: Job, other: Job) -> bool:
    return (one.source.file, one.source.start) == (other.source.file, other.source.start)


def _note_config(plan: Plan, edits: dict[str, Edits], added: dict[str, TensorInfo]) -> None:
    """What config.json must say differently: vocabulary, labels, the class with the new head."""
    for name, found in edits.items():
        if found.replacement is None or name not in plan.base.tensors:
            continue
        new, old = found.replacement.shape, plan.base.tensors[name].shape
        if is_vocabulary(name) and new[:1] != old[:1]:
            plan.config_changes["vocab_size"] = new[0]
    heads = [*added.items(), *((n, e.replacement) for n, e in edits.items() if e.replacement)]
    labels = {i.shape[0] for n, i in heads if LABEL_HEAD.search(n) and len(i.shape) == 2}
    tasks = {str(a.declared.task) for a in plan.adapters} & CLASSIFYING
    if len(labels) == 1 and tasks != {"QUESTION_ANS"}:
        plan.config_changes["num_labels"] = labels.pop()
    if added and len(tasks) == 1:
        plan.config_changes["architecture"] = CLASS_ENDS[tasks.pop()]
