"""The plan of the merge that a model is claimed to come of; and its measuring in a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratool.adapters.picking import picked, with_only
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.merging.identity import note_other_base
from loratool.merging.plan import Plan
from loratool.merging.proof.checking import Pair, measure
from loratool.merging.proof.findings import Stats
from loratool.merging.proof.pairing import pair_up
from loratool.merging.provenance import read_record
from loratool.merging.replication import replicated
from loratool.merging.residual_base import plan_on
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import AS_IT_WAS_TRAINED
from loratool.notices import Notice
from loratool.paths import Choice
from loratool.storage.filenames import PROVENANCE
from loratool.streams.cluster import Cluster, ClusterCall
from loratool.streams.run import Run
from loratool.streams.shares import share
from loratool.verbs.inputs import Source, check_weights, told_before, told_of
from loratool.verbs.making import as_place, recalled, recordable

#: Tasks of a cluster: about so many bytes each, and so many of them at least and at most.
_SHARE, _LEAST_TASKS, _MOST_TASKS = 2_000_000_000, 4, 512
#: Bytes of memory that one takes at most.
_MEMORY = 2 << 30


def claimed_plan(
    merged: Source,
    base: Source,
    adapters: Sequence[Source],
    weights: list[float | str],
    allow_unmatched: bool,
    components: list[str],
    include: list[str],
    exclude: list[str],
    told: Told | Sequence[Told],
    expert_b_layout: str | None,
    initial: Source | None,
    replicate_layers: bool,
) -> Plan:
    """The plan of the merge that is claimed to have given `merged`."""
    original = dequantised(open_checkpoint(base))
    record = read_record(Path(merged)) if Path(merged).is_dir() else None
    recorded = record["options"] if record else {}
    parts = components or recorded.get("components") or []
    expert_b_layout = expert_b_layout or recorded.get("expert_b_layout")
    said = told_of(told or told_before(record, adapters) or (), adapters, expert_b_layout)
    loras = [read_lora(source, own, original) for source, own in zip(adapters, said, strict=True)]
    choice = Choice(tuple(include), tuple(exclude))
    loras = picked(loras, choice)
    before = None
    if initial is not None:
        before = with_only(read_lora(initial, said[0], original), choice)
    if replicate_layers or recorded.get("replicate_layers"):
        original = replicated(original, loras)
    plan = plan_on(
        original,
        loras,
        check_weights(weights, adapters),
        "base",
        allow_unmatched,
        parts,
        before,
        AS_IT_WAS_TRAINED,
    )
    plan.notices += note_other_base(original, loras) + _note_other_choice(record, choice)
    return plan


def _note_other_choice(record: dict[str, Any] | None, choice: Choice) -> list[Notice]:
    """A warning where the model's record says that other parts were merged."""
    recorded = record["options"] if record else {}
    merged = Choice(tuple(recorded.get("include", ())), tuple(recorded.get("exclude", ())))
    if record is None or merged == choice:
        return []
    options = [f"--{name} {glob!r}" for name, globs in merged.to_dict().items() for glob in globs]
    text = (
        f"By its {PROVENANCE} only some parts were merged ({' '.join(options)}); the check is of "
        "what was asked for."
        if merged
        else f"By its {PROVENANCE} all parts were merged; the check is of what was asked for."
    )
    return [Notice("other-parts", text)]


def measured_in_cluster(pairs: Sequence[Pair], run: Run, claim: dict[str, Any]) -> dict[str, Stats]:
    """The statistics of every pair, from the tasks of a cluster."""
    sizes = {pair.job.name: pair.merged.disk_bytes for pair in pairs}
    count = max(1, min(len(pairs), _MOST_TASKS, max(_LEAST_TASKS, sum(sizes.values()) // _SHARE)))
    shares = [share(sizes, number, count) for number in range(1, count + 1)]
    advance = run.counted(sum(sizes.values()))
    found: dict[str, Stats] = {}
    with Cluster(run.cluster or "", run.threads) as cluster:
        threads = cluster.threads()
        initial = claim["initial"]
        placed = {
            "merged": as_place(claim["merged"]), "base": as_place(claim["base"]),
            "adapters": [as_place(source) for source in claim["adapters"]],
            "initial": None if initial is None else as_place(initial),
        }  # fmt: skip
        arguments = recordable({**claim, **placed})
        calls = [
            ClusterCall(f"{number}/{count}", (arguments, names, threads), _MEMORY)
            for number, names in enumerate(shares, 1)
        ]
        for name, stats in cluster.results(_measured, calls):
            found |= stats
            advance(sum(sizes[tensor] for tensor in stats), name)
    return found


def _measured(claim: dict[str, Any], names: list[str], threads: int) -> dict[str, Stats]:
    """What one task measures: the tensors of these names."""
    plan = claimed_plan(**recalled(claim))
    model = dequantised(open_checkpoint(recalled(claim)["merged"]))
    pairs = [pair for pair in pair_up(plan, model).pairs if pair.job.name in set(names)]
    for folder, infos in (
        (plan.base.folder, [pair.job.source for pair in pairs]),
        (model.folder, [pair.merged for pair in pairs]),
    ):
        files = {path for info in infos for path in info.files if path.parent == folder.path}
        folder.fetch(sorted(path.name for path in files))
    return measure(pairs, Run(threads))
