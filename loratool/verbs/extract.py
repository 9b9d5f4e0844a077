"""extract: a low-rank adapter from a fine-tuned model minus its base."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from loratool.dtypes import FACTOR_DTYPES
from loratool.errors import UsageError, explained_os_errors
from loratool.extracting.options import ExtractOptions
from loratool.extracting.pairing import pair
from loratool.extracting.quantised_sides import note_rescaled
from loratool.extracting.report import ExtractReport, report_of
from loratool.models.checkpoint import Checkpoint, open_checkpoint, refuse_placeholders
from loratool.models.quantised.base import dequantised
from loratool.notices import Notice
from loratool.storage.destination import Overwrite, check_output, refuse_company
from loratool.storage.filenames import MODEL_ENTRIES
from loratool.storage.folder import origin_of
from loratool.storage.tensors import FilePool
from loratool.storage.weights import entry_of
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.shares import WorkShare, parse_share
from loratool.streams.threads import few
from loratool.verbs.extracting import extract_to
from loratool.verbs.inputs import check_paths, parse_bytes
from loratool.verbs.making import as_place


@explained_os_errors()
def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
    patterns: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip: Sequence[str] = (),
    save: Sequence[str] = (),
    embeddings: bool = False,
    dtype: str = "float16",
    base_name: str | None = None,
    exact: bool = False,
    keep_noise: bool = False,
    seed: int = 0,
    verify: bool = False,
    device: str = "cpu",
    overwrite: Overwrite = False,
    dry_run: bool = False,
    restart: bool = False,
    worker: str | WorkShare | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Make a PEFT adapter of the difference between a fine-tuned model and its base.

    Every tensor is read once (twice with `verify`), its difference taken in float32 and cut to its
    largest singular values (Eckart and Young, 1936), by a randomised method whose distance from the
    best is bounded. One of `rank`, `energy` and `budget` is needed, but for a dry run.

    Parameters
    ----------
    base, tuned: model directories or weights files, in any dtypes and any split into shards.
    output: directory to make; it appears complete or not at all. None only for a dry run.
    rank: this rank for every module. energy: the smallest rank with this share of ‖Δ‖² in every
        module. budget: bytes of the weights file ("50MB"), for the largest rank that fits.
        max_rank: no module gets more. No rank is above what the widest matrix has.
    patterns: each module gets a rank of its own, which not all programs read: the smallest by
        energy, or ranks for which the total error within the budget is smallest. uniform: one rank
        for all, as without either.
    include, exclude: globs on module paths; what is not chosen is left out, and said so.
    skip: groups that are left out: "norms", "biases", "embeddings", "convs", "heads", "others".
    save: globs on module paths that are saved whole instead of as factors. "norms" and "biases" are
        all of these, which are left out otherwise.
    embeddings: embeddings too, which are left out otherwise: factors for those of tokens, and for a
        head that is the same matrix; all others whole.
    dtype: of the factors. Tensors saved whole keep their own.
    base_name: base_model_name_or_path of the config; by default the base's Hub id, or its absolute
        path.
    exact: full decompositions. seed: of the randomised ones; equal seeds give equal bytes.
    keep_noise: also keep tensors whose change is nothing but the rounding of their dtypes.
    verify: read the adapter back and measure base + adapter against the tuned model.
    device: "cpu", or "cuda" for the algebra.
    dry_run: measure how much changed, and decompose nothing.
    restart, worker, ray: as for `merge`; what is shared out are matrices, not files.
    progress: called with (bytes done, bytes in all, tensor).

    Raises
    ------
    UsageError: options that contradict each other. FileError, BaseError: a model that cannot be
    read. MatchError: the two are no base and fine-tune. ValueRangeError: NaN, infinity, or nothing
    changed. OutputError. VerifyError.
    """
    started = time.perf_counter()
    run = Run(
        threads, progress, overwrite, dry_run, device, restart, parse_share(worker), cluster=ray
    )
    check_paths([base, tuned], [tuned], "loratool extract BASE TUNED --rank 8 -o OUT")
    if not (dry_run or output):
        raise UsageError("No output given.", "Say where to write: -o OUT.")
    options = ExtractOptions(
        rank=rank, energy=energy, budget=None if budget is None else parse_bytes(budget),
        max_rank=max_rank, uniform=uniform, patterns=patterns, include=tuple(include),
        exclude=tuple(exclude), skip=tuple(skip), save=tuple(save), embeddings=embeddings,
        dtype=dtype, exact=exact, keep_noise=keep_noise, seed=seed,
    )  # fmt: skip
    options.check(dry_run)
    target = Path(output) if output else None
    if target is not None:
        check_output(target, [Path(base), Path(tuned)], overwrite)
        if run.share is None:
            refuse_other_run(target)
    before = dequantised(open_checkpoint(base))
    after = dequantised(open_checkpoint(tuned))
    _refuse_same(before, after)
    if target is not None:
        check_output(target, [p.resolve() for p in (*before.files, *after.files)], overwrite)
        refuse_company(target, (), overwrite)
    for model in (before, after):
        refuse_placeholders(model)
    rescaled = note_rescaled(before, after)
    pairs = pair(before, after, options.selection)
    pairs.notices += [*before.notices, *after.notices, *_note_swapped(before, after)]
    pairs.notices += rescaled
    before.fetch()
    after.fetch()

    from loratool.extracting.decomposition import Extraction, as_device
    from loratool.extracting.outcome import gather
    from loratool.extracting.output import propose  # torch: two seconds to import
    from loratool.streams.workers import Workers

    total = sum(part.nbytes for part in pairs.found)
    if verify and not dry_run:
        total += sum(part.tuned.nbytes for part in pairs.found)
    if run.cluster is not None and not dry_run:  # its tasks' work, and what is made of it here
        total += sum(part.nbytes for part in pairs.found)
    advance = run.counted(total)
    where = as_device(run.device)
    # Full decompositions hold several dense matrices, and a GPU's memory is one.
    count = few(threads) if exact or where.type == "cuda" else threads
    proposals: dict[int, int] = {}
    part = None
    with FilePool() as files, Workers(count) as workers:
        work = Extraction(
            files, workers, FACTOR_DTYPES[dtype], where, seed, exact, keep_noise, advance
        )
        if dry_run or target is None:
            held = gather(pairs, work.measure(pairs.found))
            proposals = propose(held, pairs, work.dtype, options)
        else:
            if not base_name:
                base_name, notices = _loadable_name(before)
                pairs.notices += notices
            arguments = {
                "base": as_place(base), "tuned": as_place(tuned), "rank": rank, "energy": energy,
                "budget": options.budget, "max_rank": max_rank, "uniform": uniform,
                "patterns": patterns, "include": list(include), "exclude": list(exclude),
                "skip": list(skip), "save": list(save), "embeddings": embeddings, "dtype": dtype,
                "base_name": base_name, "exact": exact, "keep_noise": keep_noise, "seed": seed,
                "verify": verify, "device": device, "overwrite": overwrite,
            }  # fmt: skip
            held, part = extract_to(
                target, before, after, pairs, work, options, run, arguments, extract
            )
    report = report_of(before, after, held, target, dtype, dry_run, not patterns)
    report.proposals, report.share = proposals, part
    report.seconds = time.perf_counter() - started
    return report


def _refuse_same(base: Checkpoint, tuned: Checkpoint) -> None:
    if {p.resolve() for p in base.files} == {p.resolve() for p in tuned.files}:
        raise UsageError(
            f"BASE and TUNED are the same files ({base.label}).", "Give the fine-tuned model too."
        )


def _note_swapped(base: Checkpoint, tuned: Checkpoint) -> list[Notice]:
    """A warning where names tell that the base is the tuned one of the two."""
    origin = Path(base.config.get("_name_or_path") or "").name
    sounds = [_TUNED.search(c.name.lower()) is not None for c in (base, tuned)]
    if origin and origin == tuned.name and origin != base.name:
        why = f"{base.name} says that it was made from {origin}"
    elif sounds == [True, False]:
        why = f"{base.name} sounds like a fine-tune and {tuned.name} does not"
    else:
        return []
    text = f"BASE and TUNED may be swapped: {why}. The adapter takes BASE to TUNED."
    return [Notice("swapped", text, base.label)]


#: Parts of names that models have after a fine-tune.
_TUNED = re.compile(r"(^|[-_. ])(instruct|chat|it|sft|dpo|grpo|rlhf|ft|(fine-?)?tuned?)($|[-_. ])")


def _loadable_name(base: Checkpoint) -> tuple[str | None, list[Notice]]:
    """What `from_pretrained` loads the base by: its id on the Hub, or the path of its folder.

    Not what its config.json calls it: that is the model which the base itself was made from.
    """
    folder = base.directory
    origin = origin_of(folder.absolute()) or origin_of(folder.resolve())
    entry = entry_of(base.folder)
    whole = entry in MODEL_ENTRIES and (base.is_directory or base.source.name == entry)
    if whole and base.model_type and origin is None:
        return os.path.abspath(folder), []
    if whole and base.model_type and origin is not None and not origin.path:
        return origin.repo, []
    text = (
        f"{base.label} can be loaded by no id and no path: it is neither a whole repository nor a "
        "folder with config.json and weights under their usual names. So adapter_config.json "
        "names no base; say with --base-name org/name what it is."
    )
    return None, [Notice("base-name", text, base.label)]
