"""dequantise: write the plain model that a quantised one stands for."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loratool.answers import Answer
from loratool.errors import BaseError, explained_os_errors, shown_argument
from loratool.merging.options import MergeOptions
from loratool.merging.planning import build_plan
from loratool.merging.range_loss import RangeLoss
from loratool.merging.resharding import reshard
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.models.quantised.treatment import AS_IT_WAS_TRAINED
from loratool.notices import Notice, document
from loratool.publishing.target import workplace
from loratool.storage.destination import Overwrite, check_output
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.streams.shares import SharedOut, WorkShare, parse_share
from loratool.verbs.inputs import check_paths, shard_size
from loratool.verbs.making import as_place, check_sharing
from loratool.verbs.writing import write_planned


@dataclass(repr=False)
class DequantiseReport(Answer):
    """What was dequantised, or with `dry_run` would be. Sizes are bytes, times seconds.

    `formats` is what the weights were stored in, `weights` how many there are.
    """

    base: str
    formats: str
    output: str
    dtype: str
    dry_run: bool
    shards: list[str]
    weights: int
    parameters: int
    bytes_to_read: int
    bytes_written: int
    bytes_needed: int
    bytes_free: int
    side_files: list[str]
    left_out: list[str]
    subnormal: int
    zeroed: int
    #: In a dry run: what float16 would lose of the range, from a sample.
    range_loss: RangeLoss | None
    verified: bool
    #: Where on the Hub the model is now, or would be; "" if it was not to be pushed.
    pushed: str
    commit: str
    created: bool
    private: bool
    #: Shards that an earlier run had uploaded.
    resumed: list[str]
    kept: bool
    #: How far the output is, where this run was one of several workers.
    share: SharedOut | None
    warnings: list[Notice]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = document(self, "warnings")
        if self.range_loss is not None:
            found["range_loss"] = dict(self.range_loss.__dict__)
        if self.share is not None:
            found["share"] = self.share.to_dict()
        return found


@explained_os_errors()
def dequantise(
    base: str | Path,
    output: str | Path | None,
    *,
    dtype: str | None = None,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    verify: bool = False,
    max_shard_size: int | str | None = None,
    push: str | None = None,
    keep: bool = True,
    private: bool = False,
    restart: bool = False,
    worker: str | WorkShare | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DequantiseReport:
    """Write the plain model that a quantised one stands for, streaming: a merge of no adapter.

    Parameters
    ----------
    base: quantised model directory, weights file or Hub id.
    dtype: "float16", "bfloat16" or "float32" for all floating tensors, or "base" for the model's
        own 16-bit dtype; float16 if not given, and bfloat16 for architectures whose activations
        exceed that.
    output, overwrite, dry_run, verify, max_shard_size, push, keep, private, restart, worker, ray,
        threads, progress: as of `merge`.

    Raises
    ------
    BaseError: the model is not quantised, or in a form that is not read. FileError,
    ValueRangeError, OutputError, VerifyError, LoginError, HubError: as of `merge`.
    """
    most = shard_size(max_shard_size)
    arguments = {
        "base": as_place(base), "dtype": dtype, "verify": verify, "overwrite": overwrite,
        "max_shard_size": most,
    }  # fmt: skip
    started = time.perf_counter()
    run = Run(
        threads, progress, overwrite, dry_run, restart=restart, share=parse_share(worker),
        cluster=ray,
    )  # fmt: skip
    options = MergeOptions(dtype, verify=verify, push=push, keep=keep, private=private)
    options.check(output)
    check_sharing(run, push)
    output = output if output is not None else workplace(str(push))
    check_paths([base, output], [base], "")
    target = Path(output)
    replaces = overwrite or run.share is not None  # what is there may be what workers made
    if run.share is None:
        refuse_other_run(target)
    check_output(target, [Path(base)], replaces)
    model = dequantised(open_checkpoint(base))
    if not isinstance(model, Dequantised):
        raise BaseError(
            f"{model.label} is not quantised: all its weights are plain.",
            "There is nothing to do: give it as it is wherever a model is wanted, for instance "
            f"loratool merge {shown_argument(base)} ADAPTER -o OUT.",
        )
    check_output(
        target, [path.resolve() for path in model.files], overwrite or run.share is not None
    )
    dtype, notices = options.dtype_for(model)
    plan = build_plan(model, [], [], dtype, quantised=AS_IT_WAS_TRAINED)
    plan.notices += notices
    if most is not None:
        reshard(plan, most)
    made = write_planned(plan, target, options, run, arguments, dequantise)
    own = {field.name for field in fields(DequantiseReport)} & made.__dict__.keys()
    return DequantiseReport(
        formats=model.title,
        **{name: made.__dict__[name] for name in own - {"weights", "seconds"}},
        weights=len(model.weights),
        seconds=time.perf_counter() - started,
    )
