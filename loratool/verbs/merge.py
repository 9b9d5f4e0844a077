"""merge: write `W + Σ weight·scale·B·A` for every tensor of a base model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from loratool.adapters.picking import picked, with_only
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.adapters.weighting import Weight
from loratool.errors import explained_os_errors
from loratool.merging.identity import note_other_base
from loratool.merging.options import MergeOptions
from loratool.merging.plan import Plan
from loratool.merging.replication import original, replicated
from loratool.merging.report import MergeReport
from loratool.merging.resharding import reshard
from loratool.merging.residual_base import plan_on
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import Quantised, note_leftover, refuse_dtype
from loratool.paths import Choice
from loratool.publishing.target import workplace
from loratool.storage.destination import (
    Overwrite,
    check_output,
)
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.shares import WorkShare, parse_share
from loratool.verbs.inputs import (
    Source,
    as_list,
    as_texts,
    check_paths,
    check_weights,
    shard_size,
    told_of,
)
from loratool.verbs.making import as_place, check_sharing
from loratool.verbs.writing import write_planned


@explained_os_errors()
def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path | None,
    *,
    weights: Sequence[float | str | Weight] | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
    components: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    told: Told | Sequence[Told] = (),
    expert_b_layout: str | None = None,
    tokenizer: str | None = None,
    again: bool = False,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    reversible: bool = False,
    verify: bool = False,
    initial: str | Path | None = None,
    replicate_layers: bool = False,
    quantised: str | None = None,
    trained_here: bool = False,
    force: bool = False,
    max_shard_size: int | str | None = None,
    push: str | None = None,
    keep: bool = True,
    private: bool = False,
    restart: bool = False,
    worker: str | WorkShare | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge LoRA adapters into a base model on disk, streaming, and write the result to `output`.

    Parameters
    ----------
    base: model directory (safetensors or pytorch_model.bin, sharded or not), or one weights file,
        or a Hub id.
    adapters: PEFT adapter directory, file or Hub id, or several of them.
    output: directory to make; it appears complete or not at all. None with `keep=False`.
    weights: one factor per adapter, of any sign; 1.0 each if not given. A text gives layers factors
        of their own: "1,0.5@layers.0-3" (docs/merging.md).
    dtype: "float16", "bfloat16" or "float32" for all floating tensors, or "base" to keep each
        tensor's own; float16 if not given, and bfloat16 for architectures whose activations exceed
        that. Arithmetic is float32 (float64 for float64 tensors), rounded once.
    allow_unmatched: merge what fits when parts of an adapter do not, and record the rest.
    components: the only parts of the base that adapters may go into, by the beginnings of names.
    include: merge only parts of the adapters whose path, or a dotted end of it, matches one of
        these globs. exclude: leave these out. What is left out is reported and recorded.
    told: what the user says of each adapter, because its file does not (alpha, how the factors
        multiply, …): one `loratool.Told` for all, or one for each, in their order.
    expert_b_layout: how lora_B of expert stacks lies where an adapter does not tell, "rank-major"
        (PEFT's) or "grouped" (Unsloth's before unsloth-zoo 2026.9.6).
    initial: an adapter as it was before training, where its initialisation changed the base
        (`pissa_niter_N`, CorDA, LoRA-GA): what it holds is taken off the base first.
    replicate_layers: copy layers of the base as the adapter's layer_replication says.
    quantised: what becomes of a quantised base: "plain" (all of it dequantised to `dtype`), "keep"
        (adapted weights and those that are one matrix with them become plain, the rest is copied),
        or "requantise" (adapted weights go back into the base's format). If not given, what no
        adapter touches is copied; else bitsandbytes' formats become plain and others are kept.
    force: quantise again also where codes have 4 bits or fewer, which keeps little of an adapter.
    trained_here: the adapter was trained on this very base, whose weights were rescaled for
        quantisation (AWQ).
    max_shard_size: bytes of tensors in a file of the output, "5GB" or a number; the base's own
        files, if not given.
    tokenizer: whose the output gets, "base" or "adapter"; an adapter's if one brings one.
    again: merge an adapter that the base holds already, by its record.
    overwrite: replace an output that exists; "all" also with files that are no part of it.
    dry_run: plan and report only; nothing is written.
    reversible: also write what `unmerge` needs to give the base back bit for bit.
    verify: read what was written and compare it with the merge computed anew.
    push: repository on the Hub ("org/name") to upload to. Each shard goes up once it is written and
        verified; the model appears there in one commit at the end. A run that was stopped goes on
        where it was.
    keep: False removes each shard here once it is on the Hub, and reads a base from the Hub shard
        by shard, so that neither must fit on the disk. private: make the repository private.
    restart: make again what an earlier run of the same merge had finished; it is taken up else.
    worker: "2/8" makes the second of eight shares of the shards, balanced by their bytes, into a
        folder that all workers share; whoever is last puts the output into its place.
    ray: makes the shards as tasks of a Ray cluster, by its address; "" begins one on this machine.
    threads: worker threads; the result does not depend on it.
    progress: called with (bytes done, bytes in all, shard name).

    Raises
    ------
    FileError, AdapterError, BaseError, MatchError: the inputs do not allow an honest merge.
    ValueRangeError: NaN, infinity or overflow. OutputError: the output cannot be written.
    VerifyError: it was written, but is not what was computed. LoginError, HubError: the Hub.
    """
    started = time.perf_counter()
    run = Run(
        threads, progress, overwrite, dry_run, restart=restart, share=parse_share(worker),
        cluster=ray,
    )  # fmt: skip
    sources = as_list(adapters)
    options = MergeOptions(
        dtype, allow_unmatched, tuple(as_texts(components)), tokenizer, again, reversible, verify,
        push, keep, private, initial, replicate_layers, Quantised(quantised, trained_here, force),
    )  # fmt: skip
    options.check(output)
    choice = Choice(tuple(as_texts(include)), tuple(as_texts(exclude)))
    check_sharing(run, push)
    output = output if output is not None else workplace(str(push))
    given = [base, output, *([] if initial is None else [initial])]
    check_paths(given, sources, "loratool merge BASE ADAPTER -o OUT")
    target = Path(output)
    factors = check_weights(weights, sources)
    said = told_of(told, sources, expert_b_layout)
    most = shard_size(max_shard_size)
    replaces = overwrite or run.share is not None  # what is there may be what workers made
    if run.share is None:
        refuse_other_run(target)
    plan = _planned(base, sources, factors, options, target, replaces, said, choice)
    if most is not None:
        reshard(plan, most)
    arguments = {
        "base": as_place(base), "adapters": [as_place(source) for source in sources],
        "weights": [factor.document for factor in factors], "dtype": dtype,
        "allow_unmatched": allow_unmatched,
        "components": as_texts(components), "include": list(choice.include),
        "exclude": list(choice.exclude), "told": said, "tokenizer": tokenizer, "again": again,
        "overwrite": overwrite, "reversible": reversible, "verify": verify,
        "initial": None if initial is None else as_place(initial),
        "replicate_layers": replicate_layers, "quantised": quantised, "trained_here": trained_here,
        "force": force, "max_shard_size": most,
    }  # fmt: skip
    report = write_planned(plan, target, options, run, arguments, merge)
    report.seconds = time.perf_counter() - started
    return report


def _planned(
    base: Source,
    adapters: Sequence[Source],
    weights: list[Weight],
    options: MergeOptions,
    target: Path,
    overwrite: Overwrite,
    told: Sequence[Told],
    choice: Choice,
) -> Plan:
    """Open everything, see that the output harms none of it, and make the plan."""
    before = [options.initial] if options.initial is not None else []
    check_output(target, [Path(base), *map(Path, [*adapters, *before])], overwrite)
    checkpoint = dequantised(open_checkpoint(base))
    loras = [
        read_lora(source, said, checkpoint) for source, said in zip(adapters, told, strict=True)
    ]
    loras = picked(loras, choice)
    initial = None
    if options.initial is not None:
        initial = with_only(read_lora(options.initial, told[0], checkpoint), choice)
    # What the inputs link to (as files in a download cache do) must not be written to either.
    files = [
        path.resolve()
        for path in (
            *checkpoint.files,
            *(path for a in (*loras, *([initial] if initial else [])) for path in a.files),
        )
    ]
    check_output(target, files, overwrite)
    if options.replicate_layers:
        checkpoint = replicated(checkpoint, loras)
    dtype, notices = options.dtype_for(checkpoint)
    plan = plan_on(
        checkpoint, loras, weights, dtype, options.allow_unmatched, options.components, initial,
        options.quantised,
    )  # fmt: skip
    plan.choice = choice
    if plan.treatment is not None:
        refuse_dtype(options.dtype, plan.treatment)
        plan.notices += plan.treatment.notices
    elif plan.rewriting is not None:
        plan.notices.append(note_leftover(original(checkpoint)))
    plan.notices += note_other_base(checkpoint, loras)
    if plan.treatment is None or plan.treatment.how == "plain":
        plan.notices += notices
    return plan
