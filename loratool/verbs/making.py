"""How an output is made file by file: by one run, by workers side by side, or by a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapters.told import Told
from loratool.errors import OutputError, UsageError, listed
from loratool.merging.plan import Plan
from loratool.notices import Notice
from loratool.storage.journal import WorkOrder
from loratool.storage.workfolder import Overtaken, WorkFolder
from loratool.storage.worksites import SHARED, order_for, work_of
from loratool.streams.cluster import Call, Cluster
from loratool.streams.run import Run
from loratool.streams.shares import NO_SHARE, SharedOut, WorkShare
from loratool.words import counted


def recordable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a verb as JSON, so that another process can call it; paths are absolute."""
    return {name: _recordable(value) for name, value in arguments.items()}


def _recordable(value: Any) -> Any:
    if isinstance(value, Told):
        return {"told": {**value.to_dict(), "expert_b_layout": value.expert_b_layout}}
    if isinstance(value, Path):
        return os.path.abspath(value)
    if isinstance(value, list | tuple):
        return [_recordable(one) for one in value]
    return value


def as_place(source: str | Path) -> str | Path:
    """A source as it can be found from any current directory: a path that is there, absolute."""
    return Path(source).absolute() if os.path.lexists(source) else source


def recalled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `recordable`."""
    return {name: _recalled(value) for name, value in arguments.items()}


def _recalled(value: Any) -> Any:
    if isinstance(value, list):
        return [_recalled(one) for one in value]
    if isinstance(value, dict) and value.keys() == {"told"}:
        said = dict(value["told"])
        layout = said.pop("expert_b_layout", None)
        return replace(Told.from_dict(said), expert_b_layout=layout)
    return value


def check_sharing(run: Run, push: str | None) -> None:
    """Raise UsageError where what is split up would be pushed file by file."""
    if push is not None and (run.share is not None or run.cluster is not None):
        raise UsageError(
            "--push takes one run, which sends each file when it is made.",
            f"Push the output when it is complete: loratool push OUT {push}",
        )


def work_folder(output: Path, order: WorkOrder, run: Run) -> WorkFolder:
    """The folder for the work on an output, as a run wants it."""
    return WorkFolder(output, order, run.overwrite, run.restart, shared=run.share is not None)


def make_share(verb: Callable[..., Any], output: Path, share: WorkShare, **options: Any) -> Any:
    """Let the function of a verb make a share of an output, as the order in its folder says."""
    order = order_for(output)
    if order is None:
        raise Overtaken(
            f"Nothing is made for {output} any more, or not on this machine.",
            "Look whether it is complete. All machines need it at the same path.",
        )
    return verb(output=output, worker=share, **{**recalled(order.arguments), **options})


def memory_of(plan: Plan) -> int:
    """Bytes that a process takes at most that makes one shard: what Python, torch and the blocks
    take, as measured (docs/performance.md), and all factors of the tensors that it has in work."""
    return 800_000_000 + 4 * max((adapter.nbytes for adapter in plan.inputs), default=0)


def make_in_cluster(work: WorkFolder, run: Run, verb: Callable[..., Any], memory: int) -> None:
    """Let the tasks of a cluster make the files of an output that are missing, each its own.

    `memory` are the bytes that one task takes at most.
    """
    files, missing = work.order.files, work.missing()
    advance = run.counted(sum(files.values()))
    for name in [name for name in files if name not in missing]:
        advance(files[name], name)
    shares = {name: WorkShare(1, 1, completes=False, names=(name,)) for name in missing}
    for name in in_cluster(work.output, shares, run, verb, memory):
        advance(files[name], name)
    if missing := work.missing():
        raise OutputError(
            f"{work.output}: the cluster's tasks have ended, and {counted(len(missing), 'file')} "
            f"of theirs cannot be found:\n{listed(missing)}",
            "All machines need the folder of the output at the same path.",
        )


def in_cluster(
    output: Path,
    shares: Mapping[str, WorkShare],
    run: Run,
    verb: Callable[..., Any],
    memory: int = 2 << 30,
) -> Iterator[str]:
    """The names of shares of an output, each when a task of a cluster has made it."""
    if not shares:
        return
    shared = work_of(output) / SHARED
    others = shared.exists()
    try:
        with Cluster(run.cluster or "", run.threads) as cluster:
            threads = cluster.threads()
            calls = [
                Call(name, (verb, output, share, threads), memory) for name, share in shares.items()
            ]
            for name, _ in cluster.results(_make_one, calls):
                yield name
    finally:
        if not others:  # the tasks are gone: the next run has the folder for itself
            shared.unlink(missing_ok=True)


def _make_one(verb: Callable[..., Any], output: Path, share: WorkShare, threads: int) -> None:
    make_share(verb, output, share, threads=threads)


def own_files(order: WorkOrder, run: Run) -> list[str]:
    """The files of an output that this process makes."""
    return list(order.files) if run.share is None else run.share.of(order.files)


def complete_output(
    place: WorkFolder,
    run: Run,
    fill: Callable[[Path], Sequence[Notice]],
    made: list[str] | None = None,
    missing: list[str] | None = None,
) -> tuple[SharedOut | None, list[Notice]]:
    """Complete an output and put it into its place, if all its files are finished.

    `fill` writes what lies beside them. What is `made` by this worker and what is `missing` are
    files of the order, or whatever else an output is made of. Returns how far the output is, for a
    worker, and what came up. Raises OutputError where nothing but completing is asked for and
    files are missing.
    """
    share = run.share
    if missing is None:
        missing = place.missing()
    if share is None:
        with place.finishing() as folder:
            notices = [*fill(folder), *place.commit(folder)]
        return None, notices
    if made is None:
        made = share.of(place.order.files)
    if missing and share is NO_SHARE:
        raise OutputError(
            f"{place.output}: {counted(len(missing), 'part', 'is')} not finished:\n"
            + listed(missing),
            "Run the workers again that make them, with the same number of workers or another one; "
            "what is finished is not made twice.",
        )
    if missing or not share.completes:
        return SharedOut(str(share), made, missing, complete=False), []
    try:
        with place.finishing(take_over=share is NO_SHARE) as folder:
            notices = [*fill(folder), *place.commit(folder)]
    except Overtaken:
        return SharedOut(str(share), made, [], complete=False), []
    return SharedOut(str(share), made, [], complete=True), notices
