"""unmerge: take adapters out of a merged model again.

With the undo file of a reversible merge the base comes back bit for bit, and the hash of every
tensor is checked. Without it the deltas are subtracted and the result rounded once: near the base,
but not the base.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.picking import with_only
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.adapters.weighting import PLAIN, Weight
from loratool.errors import RestoreError, explained_os_errors
from loratool.merging.provenance import Merged, merged_into, read_record
from loratool.merging.recognising import identify
from loratool.merging.undo.sidefiles import fetch_undo, open_undo
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.storage.destination import (
    Overwrite,
    check_output,
)
from loratool.storage.filenames import PROVENANCE
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.shares import WorkShare, parse_share
from loratool.verbs.inputs import (
    as_list,
    check_dtype,
    check_paths,
    check_weights,
    told_before,
    told_of,
)
from loratool.verbs.making import as_place
from loratool.verbs.unmerging import Request, UnmergeReport, restore_base, subtract_deltas


@explained_os_errors()
def unmerge(
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float | str | Weight] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    told: Told | Sequence[Told] = (),
    expert_b_layout: str | None = None,
    subtract: bool = False,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    restart: bool = False,
    worker: str | WorkShare | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Take LoRA adapters out of a merged model on disk and write the result to `output`.

    Parameters
    ----------
    merged: model directory that `merge` wrote, or another one that holds the adapters.
    adapters: the adapters that were merged; all of them to get the base back bit for bit.
    output: directory to make; it appears complete or not at all.
    weights: what the adapters were merged with. Known from loratool.json where there is one, and
        then only checked; else 1.0 each.
    base: originals, complete or in part (a directory, or one shard): what is there is copied, the
        rest subtracted. Not needed with an undo file.
    dtype: of the result where it is subtracted; the base's by default, if known.
    told, expert_b_layout: as it was for `merge`.
    subtract: do without the undo file.
    overwrite: replace an output that exists; "all" also with files that are no part of it.
    dry_run: report only; nothing is written.
    restart, worker, ray: as for `merge`.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    RestoreError: adapters or weights that were not merged, a tensor that does not come out as it
        was, or what cannot be taken back without the undo file. FileError, AdapterError, BaseError,
        MatchError, OutputError as in `merge`.
    """
    started = time.perf_counter()
    run = Run(
        threads, progress, overwrite, dry_run, restart=restart, share=parse_share(worker),
        cluster=ray,
    )  # fmt: skip
    sources = as_list(adapters)
    check_paths([merged, output], sources, "loratool unmerge MERGED ADAPTER -o OUT")
    if dtype is not None:
        check_dtype(dtype)
    factors = check_weights(weights, sources) if weights else None
    target = Path(output)
    originals = [Path(base)] if base is not None else []
    check_output(target, [Path(merged), *originals, *map(Path, sources)], overwrite)
    if run.share is None:
        refuse_other_run(target)
    arguments = {
        "merged": as_place(merged), "adapters": [as_place(source) for source in sources],
        "weights": [factor.document for factor in factors] if factors else None,
        "base": None if base is None else as_place(base), "dtype": dtype,
        "told": told if isinstance(told, Told) else list(told), "expert_b_layout": expert_b_layout,
        "subtract": subtract, "overwrite": overwrite,
    }  # fmt: skip
    checkpoint = open_checkpoint(merged)
    checkpoint.folder.fetch([PROVENANCE])
    record = read_record(checkpoint.directory) if checkpoint.is_directory else None
    recorded = record["options"].get("expert_b_layout") if record else None
    said = told_of(told or told_before(record, sources) or (), sources, expert_b_layout or recorded)
    model = dequantised(checkpoint)
    loras = [read_lora(source, own, model) for source, own in zip(sources, said, strict=True)]
    checkpoint.fetch()
    fetch_undo(checkpoint.folder)
    undo = None if subtract else open_undo(checkpoint, record)
    inputs = [
        path.resolve() for path in (*checkpoint.files, *(path for a in loras for path in a.files))
    ]
    check_output(target, inputs, overwrite)
    known = loras, factors or [PLAIN] * len(loras), list[Merged]()
    if record is not None:
        known = _recognised(checkpoint, loras, factors, undo is not None)
    for lora in known[0]:
        refuse_not_finite(lora)
    request = Request(checkpoint, record or {}, *known, target, run, unmerge, arguments)
    if undo is not None:
        report = restore_base(request, undo, base, dtype)
    else:
        report = subtract_deltas(request, base, dtype)
    report.seconds = time.perf_counter() - started
    return report


def _recognised(
    merged: Checkpoint, adapters: list[Adapter], weights: list[Weight] | None, exact: bool
) -> tuple[list[Adapter], list[Weight], list[Merged]]:
    """The adapters in the order of merging, with the parts that were merged, their weights by the
    record, and those that stay."""
    held = merged_into(merged.directory)
    # With the undo file, what the base held before stays where it was.
    earlier = merged_into(merged.directory, of_base=True)
    everything = held if exact else [*earlier, *held]
    if not everything:
        raise RestoreError(
            f"{merged.label}: by its {PROVENANCE} no adapter is merged into it.",
            "It may be what `unmerge` made; check the path.",
        )
    found = identify(adapters, everything, weights, earlier if exact else ())
    order = sorted(range(len(found)), key=lambda i: found[i])
    remaining = [entry for i, entry in enumerate(everything) if i not in found]
    chosen = [everything[found[i]].weight for i in order]
    taken = [with_only(adapters[i], everything[found[i]].choice) for i in order]
    return taken, chosen, remaining
