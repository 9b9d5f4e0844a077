"""The plan of a merge: what becomes of every tensor, decided from headers before data is read.

A plan is a list of jobs per output shard, one job per output tensor. Every refusal happens while it
is built, so that a plan that exists can be carried out; `--dry-run` prints it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loratool.adapter import Adapter, LowRank, Notice, TokenRows
from loratool.checkpoint.base import Checkpoint, refuse_quantised
from loratool.checkpoint.layout import LM_CLASS, Layout, Tied, is_legacy_buffer
from loratool.checkpoint.tensors import DTYPE_BITS, TensorInfo, read_raw
from loratool.errors import AdapterError, MatchError, listed
from loratool.matching import Delta, Match, is_vocabulary, match

#: What `--dtype` may be, and the safetensors code of it.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "base": ""}


@dataclass(frozen=True)
class BiasTerm:
    """`b += scale·lora_B.bias`, with the user's weight in the scale."""

    info: TensorInfo
    scale: float


@dataclass(frozen=True)
class Job:
    """How one output tensor comes about.

    `source` is read (from the base, or from an adapter that replaces the tensor), the deltas, bias
    terms and token rows are applied in float32, and the result is rounded once to `dtype`.
    `action` names it for people: copy, cast, merge, replace or add.
    """

    name: str
    dtype: str
    source: TensorInfo
    action: str
    deltas: tuple[Delta, ...] = ()
    biases: tuple[BiasTerm, ...] = ()
    rows: tuple[TokenRows, ...] = ()
    #: False for integers and for legacy buffers, which may hold -inf by design.
    checked: bool = True

    @property
    def is_arithmetic(self) -> bool:
        return bool(self.deltas or self.biases or self.rows)

    @property
    def is_verbatim(self) -> bool:
        return not self.is_arithmetic and self.dtype == self.source.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.source.numel * DTYPE_BITS[self.dtype] // 8


@dataclass
class Plan:
    """Everything a merge will do. `shards` maps output files to jobs in the order of their data."""

    base: Checkpoint
    adapters: list[Adapter]
    weights: list[float]
    dtype: str
    shards: dict[str, list[Job]] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    modules: int = 0

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def bytes_to_read(self) -> int:
        return sum(j.source.nbytes for j in self.jobs) + sum(a.nbytes for a in self.adapters)

    @property
    def bytes_to_write(self) -> int:
        return sum(j.nbytes for j in self.jobs)

    def counts(self) -> dict[str, int]:
        """Number of tensors by action."""
        found = dict.fromkeys(("merge", "replace", "add", "cast", "copy"), 0)
        for job in self.jobs:
            found[job.action] += 1
        return found


@dataclass
class _Edits:
    """What all adapters together do to one tensor."""

    deltas: list[Delta] = field(default_factory=list)
    biases: list[BiasTerm] = field(default_factory=list)
    rows: list[TokenRows] = field(default_factory=list)
    replacement: TensorInfo | None = None

    def __bool__(self) -> bool:
        return bool(self.deltas or self.biases or self.rows or self.replacement)


def build_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    dtype: str = "float16",
    allow_unmatched: bool = False,
) -> Plan:
    """Plan `W + Σ weight·scale·B·A` for every tensor of `base`.

    Raises BaseError for a quantised base, AdapterError for an adapter that has no merged form, and
    MatchError where a part of an adapter finds no place (unless `allow_unmatched`).
    """
    refuse_quantised(base)
    plan = Plan(base, list(adapters), list(weights), dtype)
    plan.notices += [Notice("base-note", note, str(base.source)) for note in base.notes]
    layout = Layout(base)
    matches = []
    for adapter in adapters:
        _refuse_unmergeable(plan, adapter, allow_unmatched)
        matches.append(match(adapter, layout))
    _refuse_unmatched(plan, matches, allow_unmatched)
    edits, added = _collect(plan, matches, layout)
    new_head = _settle_tied(plan, layout, edits)
    _refuse_unlike_vocabularies(plan, edits)
    _fill_shards(plan, edits, added, new_head)
    _note_config(plan, edits, added)
    plan.modules = sum(len(m.deltas) for m in matches)
    return plan


def _refuse_unmergeable(plan: Plan, adapter: Adapter, allow_unmatched: bool) -> None:
    tolerated = ("unknown-tensors", "half-a-pair") if allow_unmatched else ()
    reasons = [n for n in adapter.notices if n.refused and n.code not in tolerated]
    if reasons:
        raise AdapterError(
            f"{adapter.source}: this adapter cannot be merged.\n"
            + "\n".join(f"  [{n.code}] {n.message}" for n in reasons),
            "`loratool inspect` shows what is in it.",
        )
    # The base's config.json settles what the adapter alone leaves open about square weights.
    settled = ("square-conv1d",) if plan.base.model_type else ()
    plan.notices += [
        n
        for n in adapter.notices
        if (not n.refused or n.code in tolerated) and n.code not in settled
    ]
    if not (adapter.modules or adapter.replaced or adapter.token_rows):
        raise AdapterError(f"{adapter.source}: the adapter adapts nothing.", "Check the file.")


def _refuse_unmatched(plan: Plan, matches: list[Match], allow: bool) -> None:
    lost = [f"{what}: {reason}" for m in matches for what, reason in m.unmatched]
    if not lost:
        return
    text = f"{len(lost)} parts of the adapter do not fit the base:\n{listed(lost)}"
    placed = sum(len(m.deltas) + len(m.replaced) + len(m.added) + len(m.rows) for m in matches)
    if not allow or not placed:
        names = ", ".join(
            repr(m.adapter.config["base_model_name_or_path"])
            for m in matches
            if m.adapter.config.get("base_model_name_or_path")
        )
        raise MatchError(
            text,
            (f"The adapter was trained on {names}; check that this is the base. " if names else "")
            + ("--allow-unmatched merges the rest." if placed else "Nothing in it fits."),
        )
    plan.notices.append(Notice("unmatched", text))


def _collect(
    plan: Plan, matches: list[Match], layout: Layout
) -> tuple[dict[str, _Edits], dict[str, TensorInfo]]:
    edits: dict[str, _Edits] = defaultdict(_Edits)
    added: dict[str, TensorInfo] = {}
    for found, weight in zip(matches, plan.weights, strict=True):
        for delta in found.deltas:
            edits[delta.tensor].deltas.append(replace(delta, weight=weight))
        for name, module in found.biases:
            edits[name].biases.append(_bias_term(module, weight))
        for name, rows in found.rows:
            taken = {i for other in edits[name].rows for i in other.indices}
            if taken & set(rows.indices):
                raise MatchError(
                    f"{name}: two adapters replace the row of the same token.",
                    "Merge one of them alone.",
                )
            edits[name].rows.append(rows)
        for name, info in found.replaced.items():
            if edits[name].replacement is not None:
                raise MatchError(f"{name}: two adapters replace it.", "Merge one of them alone.")
            edits[name].replacement = info
        for name, info in found.added.items():
            if name in added:
                raise MatchError(f"{name}: two adapters add it.", "Merge one of them alone.")
            added[name] = info
        if weight != 1 and (found.replaced or found.added or found.rows):
            plan.notices.append(
                Notice(
                    "weight-not-applied",
                    f"{found.adapter.name} also replaces whole tensors or token rows; its weight "
                    f"{weight:g} applies to its low-rank part only.",
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


def _bias_term(module: LowRank, weight: float) -> BiasTerm:
    assert module.bias is not None
    assert module.scale is not None
    return BiasTerm(module.bias, weight * module.scale)


def _settle_tied(plan: Plan, layout: Layout, edits: dict[str, _Edits]) -> Job | None:
    """Keep the function of a model whose head is its input embedding's matrix.

    In PEFT's forward pass an adapter on one of the two leaves the other alone. The merged model
    does the same with two matrices and an untied config. They stay one where both change alike.
    Returns the job of a head that the base's files do not hold, if one is needed.
    """
    tied = layout.tied
    if tied is None or not _has_language_head(plan, tied):
        return None
    embedding, head = edits.get(tied.embedding, _Edits()), edits.pop(tied.head, _Edits())
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
    return _job(plan, tied.head, source, head, "add")


def _has_language_head(plan: Plan, tied: Tied) -> bool:
    """Whether the model the adapters were trained on has the head that `tied` speaks of."""
    tasks = {a.config.get("task_type") for a in plan.adapters}
    if tasks <= _HEADLESS_TASKS:
        return False
    trained = [a.config.get("auto_mapping") or {} for a in plan.adapters]
    classes = [str(mapping.get("base_model_class")) for mapping in trained]
    return bool(
        tied.certain
        or tasks & {"CAUSAL_LM", "SEQ_2_SEQ_LM"}
        or any(LM_CLASS.search(name) for name in classes)
    )


def _refuse_unlike_vocabularies(plan: Plan, edits: dict[str, _Edits]) -> None:
    """An adapter that resizes only one of embedding and head gives a model that does not load."""
    rows = {}
    for name, info in plan.base.tensors.items():
        if is_vocabulary(name) and len(info.shape) == 2:
            source = edits[name].replacement if name in edits else None
            rows[name] = (source or info).shape[0]
    resized = [n for n, count in rows.items() if count != plan.base.tensors[n].shape[0]]
    if resized and len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise MatchError(
            f"The adapter resizes {resized[0]} alone, so the vocabularies differ: {counts} rows.",
            "Save the other one too: modules_to_save=['embed_tokens', 'lm_head'].",
        )


def _change_alike(plan: Plan, embedding: _Edits, head: _Edits) -> bool:
    """True if both matrices get the same: equal replacements, and deltas that are transposes.

    `ensure_weight_tying` writes the head's factors as `A = B_embᵀ`, `B = A_embᵀ`.
    """
    if (embedding.replacement is None) != (head.replacement is None):
        return False
    if (
        embedding.replacement is not None
        and head.replacement is not None
        and not _same_values(embedding.replacement, head.replacement)
    ):
        return False
    if len(embedding.rows) != len(head.rows) or len(embedding.deltas) != len(head.deltas):
        return False
    for one, other in zip(embedding.rows, head.rows, strict=True):
        if one.indices != other.indices or not _same_values(one.rows, other.rows):
            return False
    if not all(a.config.get("ensure_weight_tying") for a in plan.adapters) and embedding.deltas:
        return False
    for ours, theirs in zip(embedding.deltas, head.deltas, strict=True):
        (b, a), (b_head, a_head) = ours.module.factors(), theirs.module.factors()
        same = np.array_equal(a_head, b.T) and np.array_equal(b_head, a.T)
        # A DoRA magnitude belongs to a dimension here and to a token there.
        if ours.scale != theirs.scale or not same or ours.module.magnitude is not None:
            return False
    return True


def _same_values(one: TensorInfo, other: TensorInfo) -> bool:
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and np.array_equal(read_raw(one), read_raw(other))


def _job(plan: Plan, name: str, source: TensorInfo, edits: _Edits, action: str = "") -> Job:
    base_dtype = source.dtype
    if edits.replacement is not None:
        source = edits.replacement
    keep = is_legacy_buffer(name, source.shape) or not source.is_float
    dtype = DTYPES[plan.dtype] or base_dtype
    if keep:
        dtype = source.dtype
    job = Job(
        name, dtype, source, action, tuple(edits.deltas), tuple(edits.biases), tuple(edits.rows),
        checked=not keep,
    )  # fmt: skip
    if not action:
        if job.is_arithmetic:
            action = "merge"
        elif edits.replacement is not None:
            action = "replace"
        else:
            action = "copy" if job.is_verbatim else "cast"
    return replace(job, action=action)


def _fill_shards(
    plan: Plan, edits: dict[str, _Edits], added: dict[str, TensorInfo], new_head: Job | None
) -> None:
    """One job per tensor, in the base's order, wide dtypes first so that data stays aligned."""
    for shard, names in plan.base.shards.items():
        jobs = [_job(plan, n, plan.base.tensors[n], edits.get(n, _Edits())) for n in names]
        if new_head is not None and any(new_head.source.start == j.source.start for j in jobs):
            jobs.append(new_head)
            new_head = None
        plan.shards[shard] = jobs
    last = list(plan.shards)[-1]
    plan.shards[last] += [_job(plan, n, info, _Edits(), "add") for n, info in added.items()]
    if new_head is not None:
        plan.shards[last].append(new_head)
    for jobs in plan.shards.values():
        jobs.sort(key=lambda job: -DTYPE_BITS[job.dtype])


def _note_config(plan: Plan, edits: dict[str, _Edits], added: dict[str, TensorInfo]) -> None:
    """What config.json must say differently: vocabulary, labels, the class with the new head."""
    for name, found in edits.items():
        if found.replacement is None or name not in plan.base.tensors:
            continue
        rows = found.replacement.shape[0]
        if is_vocabulary(name) and rows != plan.base.tensors[name].shape[0]:
            plan.config_changes["vocab_size"] = rows
    heads = [*added.items(), *((n, e.replacement) for n, e in edits.items() if e.replacement)]
    labels = {info.shape[0] for name, info in heads if _LABEL_HEAD.search(name)}
    tasks = {str(a.config.get("task_type")) for a in plan.adapters} & _TASK_CLASSES.keys()
    if len(labels) == 1 and tasks != {"QUESTION_ANS"}:
        plan.config_changes["num_labels"] = labels.pop()
    if added and len(tasks) == 1:
        plan.config_changes["architecture"] = _TASK_CLASSES[tasks.pop()]


#: Last layers of classifiers, with a row per label.
_LABEL_HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")

#: Tasks whose models have no language-model head, so that no tie matters.
_HEADLESS_TASKS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}

_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
