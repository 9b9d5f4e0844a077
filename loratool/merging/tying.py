"""Keep the function of models whose output head is their input embedding's matrix.

In PEFT's forward pass an adapter on one of the two leaves the other alone. The merged model does
the same with two matrices and an untied config; they stay one where both change alike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratool.errors import MatchError
from loratool.merging.plan import Edits, Job, Plan, make_job
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import LM_CLASS, is_vocabulary
from loratool.models.layouts.tying import Tied
from loratool.models.tasks import HEADLESS, WRITING
from loratool.notices import Notice
from loratool.storage.values import same_bytes


def settle_ties(plan: Plan, layout: Layout, edits: dict[str, Edits]) -> list[Job]:
    """Keep the function of a model in which matrices are one that an adapter changes apart.

    Returns the jobs of those that the base's files do not hold.
    """
    head = _settle_head(plan, layout, edits)
    jobs = [] if head is None else [head]
    for name, whole in layout.aliases.items():
        if layout.tied is not None and name == layout.tied.head:
            continue
        own = edits.pop(name, Edits())
        if own or edits.get(whole):
            source = plan.base.tensors[whole].renamed(name)
            jobs.append(replace(make_job(plan, name, source, own, "add"), untied=True))
            text = (
                f"{whole} and {name} were one matrix and now differ: both are written. "
                "transformers 5 reads both; older versions tie them again."
            )
            plan.notices.append(Notice("untied", text, name))
    return jobs


def _settle_head(plan: Plan, layout: Layout, edits: dict[str, Edits]) -> Job | None:
    """Keep the function of a model whose head is its input embedding's matrix.

    In PEFT's forward pass an adapter on one of the two leaves the other alone. The merged model
    does the same with two matrices and an untied config. They stay one where both change alike.
    Returns the job of a head that the base's files do not hold, if one is needed.
    """
    tied = layout.tied
    if tied is None or not _has_language_head(plan, tied):
        return None
    embedding, head = edits.get(tied.embedding, Edits()), edits.pop(tied.head, Edits())
    if not embedding and not head:
        return None
    base_rows = plan.base.tensors[tied.embedding].shape[0]
    for one, other in ((embedding, head), (head, embedding)):
        if one.replacement is not None and one.replacement.shape[0] != base_rows and not other:
            # The other one is the resized matrix too, without the delta that only this one has.
            other.replacement = one.replacement
            edits[tied.embedding] = embedding
    # PEFT ties trained token rows to the head too.
    only_rows = bool(embedding.rows) and not (embedding.deltas or embedding.replacement or head)
    if only_rows or _change_alike(plan, embedding, head):
        if tied.head_on_disk:
            edits[tied.head] = embedding
        return None
    if not tied.separable:
        raise MatchError(
            f"{tied.embedding} and {tied.head} are one matrix in this model, and the adapter "
            "changes one of them alone; a masked-language-model head cannot have its own.",
            "Adapt other modules than the embedding and the head.",
        )
    head.rows = head.rows or list(embedding.rows)
    plan.config_changes["tie_word_embeddings"] = False
    plan.notices.append(
        Notice(
            "untied",
            f"{tied.embedding} and {tied.head} were one matrix and now differ: both are written "
            "and tie_word_embeddings is false.",
        )
    )
    if tied.head_on_disk:
        edits[tied.head] = head
        return None
    source = plan.base.tensors[tied.embedding].renamed(tied.head)
    return replace(make_job(plan, tied.head, source, head, "add"), untied=True)


def _has_language_head(plan: Plan, tied: Tied) -> bool:
    """Whether the model the adapters were trained on has the head that `tied` speaks of."""
    declared = [a.declared for a in plan.adapters]
    tasks = {d.task for d in declared}
    if tasks <= HEADLESS:
        return False
    writes = tasks & WRITING or any(LM_CLASS.search(d.model_class) for d in declared)
    return tied.certain or bool(writes)


def refuse_unlike_vocabularies(plan: Plan, edits: dict[str, Edits]) -> None:
    """An adapter that resizes only one of embedding and head gives a model that does not load."""
    if not any(found.replacement for found in edits.values()):
        return
    rows = {}
    for name, info in plan.base.tensors.items():
        if is_vocabulary(name) and len(info.shape) == 2:
            source = edits[name].replacement if name in edits else None
            rows[name] = (source or info).shape[0]
    before = {name: plan.base.tensors[name].shape[0] for name in rows}
    resized = [name for name, count in rows.items() if count != before[name]]
    # Models of several parts have vocabularies of their own; padding is less than a tenth.
    near = [
        n for n in rows if any(9 * before[r] <= 10 * before[n] <= 11 * before[r] for r in resized)
    ]
    rows = {name: rows[name] for name in near}
    if resized and len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise MatchError(
            f"The adapter resizes {resized[0]} alone, so the vocabularies differ: {counts} rows.",
            "Save the other one too: modules_to_save=['embed_tokens', 'lm_head'].",
        )


def _change_alike(plan: Plan, embedding: Edits, head: Edits) -> bool:
    """True if both matrices get the same: equal replacements, and deltas that are transposes.

    `ensure_weight_tying` writes the head's factors as `A = B_embᵀ`, `B = A_embᵀ`.
    """
    if (embedding.replacement is None) != (head.replacement is None):
        return False
    if (
        embedding.replacement is not None
        and head.replacement is not None
        and not same_bytes(embedding.replacement, head.replacement)
    ):
        return False
    if len(embedding.rows) != len(head.rows) or len(embedding.deltas) != len(head.deltas):
        return False
    for one, other in zip(embedding.rows, head.rows, strict=True):
        if one.indices != other.indices or not same_bytes(one.rows, other.rows):
            return False
    if not all(a.declared.ties_head for a in plan.adapters) and embedding.deltas:
        return False
    for ours, theirs in zip(embedding.deltas, head.deltas, strict=True):
        one_pair, other_pair = ours.factors.left_right(), theirs.factors.left_right()
        if ours.scale != theirs.scale or not one_pair or not other_pair:
            return False
        (b, a), (b_head, a_head) = one_pair, other_pair
        if ours.place.transposed:
            # A DoRA magnitude belongs to a dimension here and to a token there.
            if not (ours.factors.adds and theirs.factors.adds):
                return False
            a, b = b.T, a.T
        if not (np.array_equal(a_head, a) and np.array_equal(b_head, b)):
            return False
        magnitudes = ours.factors.magnitude, theirs.factors.magnitude
        if magnitudes[0] is not magnitudes[1]:
            return False
    return True
