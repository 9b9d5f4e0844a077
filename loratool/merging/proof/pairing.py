"""Which tensor of a merged model each job of a plan should have given.

Other tools write other dtypes, other shard splits, names with another prefix, and keep or drop the
copy of a tied head. All of that is understood here; what remains is missing, added or misshapen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratool.errors import VerifyError, listed
from loratool.merging.plan import Job, OutputShard, Plan
from loratool.merging.proof.checking import Pair, measure
from loratool.merging.proof.findings import Finding
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.assembly import assembled
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import is_legacy_buffer
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.tying import Tied
from loratool.notices import Notice
from loratool.storage.header import read_header
from loratool.storage.tensors import TensorInfo
from loratool.streams.run import Run
from loratool.words import counted


@dataclass
class Pairing:
    """`pairs` can be compared; `findings` are tensors that cannot."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def pair_up(plan: Plan, merged: Checkpoint) -> Pairing:
    """Find the merged tensor of every job."""
    found = Pairing()
    jobs = {job.name: job for job in plan.jobs}
    layout, own = Layout(merged), Layout(plan.base)
    for name, before in plan.base.tensors.items():
        if any(segment.memory == name for segment in own.holdings.names.segments(name)):
            layout.holdings.known_rows[name] = before.shape[0] if before.shape else 1
    naming = choose_naming(
        layout,
        [
            Wanted(name, job.source.shape, whole=True)
            for name, job in jobs.items()
            if name in plan.base.tensors
        ],
    )
    _settle_heads(found, plan, jobs, merged, layout, own.tied)
    for name, whole in own.aliases.items():
        is_head = own.tied is not None and name == own.tied.head
        if name in jobs and not is_head and layout.name_of(name) not in merged.tensors:
            _tie_again(found, jobs, name, whole)
    taken = set()
    for job in jobs.values():
        info, names = _merged_tensor(naming(job.name), job, layout, own.holdings)
        if info is None:
            if not is_legacy_buffer(job.name, job.source.shape):
                found.findings.append(Finding(job.name, "missing", job.is_adapted))
            continue
        taken |= names
        if info.shape != job.source.shape:
            note = f"{list(info.shape)} instead of {list(job.source.shape)}"
            found.findings.append(Finding(job.name, "shape", job.is_adapted, note=note))
        elif info.is_float != job.source.is_float or (
            not info.is_float and info.dtype != job.source.dtype
        ):
            note = f"{info.dtype} instead of {job.dtype}"
            found.findings.append(Finding(job.name, "dtype", job.is_adapted, note=note))
        else:
            found.pairs.append(Pair(replace(job, dtype=info.dtype), info))
    for name, info in merged.tensors.items():
        if name not in taken and not is_legacy_buffer(name, info.shape):
            found.findings.append(Finding(name, "added", False))
    return found


def _merged_tensor(
    name: str, job: Job, layout: Layout, base: Holdings
) -> tuple[TensorInfo | None, set[str]]:
    """What the merged model has in the place of a job's tensor, and the names of its own tensors
    that this is: where it is cut otherwise than the base, parts of several or a part of one."""
    owns = [own for called in (name, job.name) if (own := layout.name_of(called))]
    there = [layout.base.tensors[own] for own in owns if own in layout.base.tensors]
    if there and there[0].shape == job.source.shape:
        return there[0], {there[0].name}
    for called in (name, job.name):
        with suppress(MisfitError):
            return assembled(layout.holdings, called, job.source.shape, base)
    return (there[0], {there[0].name}) if there else (None, set())


def check_written(shards: Sequence[OutputShard], folder: Path, run: Run) -> None:
    """Read what a merge wrote into `folder` and compute it anew. Raises VerifyError."""
    pairs = []
    for shard in shards:
        written, _ = read_header(folder / shard.name)
        pairs += [Pair(job, written[job.name]) for job in shard.jobs]
    stats = measure(pairs, run)
    wrong = [
        f"{n}: {s.elements - s.equal} values" for n, s in stats.items() if s.equal < s.elements
    ]
    if wrong:
        raise VerifyError(
            f"{counted(len(wrong), 'tensor')} cannot be read back as computed:\n{listed(wrong)}",
            "An input changed during the merge, or the memory or the disk of this machine is at "
            "fault. Nothing was left behind.",
        )


def _tie_again(found: Pairing, jobs: dict[str, Job], name: str, whole: str) -> None:
    """Put the deltas of a matrix that the merge made apart into the one that it was, as PEFT
    does."""
    alone, both = jobs.pop(name), jobs[whole]
    jobs[whole] = replace(both, deltas=(*both.deltas, *alone.deltas))
    found.notices.append(
        Notice(
            "tied-together",
            f"{whole} and {name} stayed one matrix, as in PEFT's merge, so "
            "what adapts one changes the other too; in the adapter's own forward pass it "
            "does not. `loratool merge` unties them.",
        )
    )


def _settle_heads(
    found: Pairing,
    plan: Plan,
    jobs: dict[str, Job],
    merged: Checkpoint,
    layout: Layout,
    base: Tied | None,
) -> None:
    """Make the jobs fit what the merged model does with a head that is its embedding's matrix."""
    if base is None:
        return
    head, embedding = jobs.get(base.head), jobs[base.embedding]
    stays_tied = layout.tied is not None and layout.tied.head not in merged.tensors
    if head is not None and stays_tied:
        del jobs[base.head]
        if plan.config_changes.get("tie_word_embeddings") is False:
            jobs[base.head] = head
            _tie_again(found, jobs, base.head, base.embedding)
    elif plan.config_changes.get("tie_word_embeddings") is False and layout.tied is not None:
        found.notices.append(
            Notice(
                "still-tied",
                f"The merged model's config.json ties {base.head} to {base.embedding}: programs "
                "that load it drop the head that the merge made. It must say false.",
            )
        )
    elif head is None and base.head in merged.tensors:
        jobs[base.head] = replace(embedding, name=base.head)  # a copy of the tied matrix
