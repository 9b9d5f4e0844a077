"""Carry out an extraction: by one run, by workers side by side, or by a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import UsageError
from loratool.extracting.counterparts import Counterparts
from loratool.extracting.options import ExtractOptions
from loratool.extracting.outcome import Outcome
from loratool.merging.ingredients import known_files
from loratool.merging.provenance import describe_model, versions
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.storage.folder import origin_of
from loratool.storage.journal import WorkOrder
from loratool.streams.results import ResultLog
from loratool.streams.run import Run
from loratool.streams.shares import SharedOut, WorkShare
from loratool.verbs.making import complete_output, in_cluster, recordable, work_folder
from loratool.words import counted

if TYPE_CHECKING:
    from loratool.extracting.decomposition import Extraction
    from loratool.extracting.output import Extracting

#: Into how many tasks of a cluster the matrices go, at most.
_TASKS = 64


def extract_to(
    target: Path,
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Counterparts,
    work: Extraction,
    options: ExtractOptions,
    run: Run,
    arguments: Mapping[str, Any],
    verb: Callable[..., Any],
) -> tuple[Outcome, SharedOut | None]:
    """Write the adapter to `target`, all or nothing; or what of it is this worker's.

    `verb` is the function of the library that was called, with these arguments.
    """
    from loratool.extracting.output import Extracting, share_of

    order = WorkOrder(verb.__name__, recordable(arguments), _made_of(base, tuned, options, run))
    outcome = Outcome([], [], [], 0, [])
    with (
        work_folder(target, order, run) as place,
        ResultLog(place.results) as log,
    ):
        extracting = Extracting(base, tuned, pairs, work, options, log)
        outcome.notices += place.notices
        if not place.notices and (known := len(pairs.found) - len(extracting.unknown())):
            text = (
                f"{known} of {counted(len(pairs.found), 'tensor')} had been finished by an "
                "earlier run and are taken up. --restart computes them again."
            )
            outcome.notices += [Notice("taken-up", text, str(target))] * (run.share is None)
        mine: list[str] = []
        if run.cluster is not None:
            _in_cluster(place.output, extracting, run, verb)
        elif run.share is not None:
            parts = share_of(pairs, run.share)
            mine = [part.name for part in parts]
            extracting.begin(parts)

        def fill(folder: Path) -> list[Notice]:
            nonlocal outcome
            before = outcome.notices
            outcome = extracting.write(
                folder, target, run, base_name=arguments["base_name"], verify=arguments["verify"]
            )
            outcome.notices += before
            return []

        missing = extracting.unknown() if run.share is not None else []
        share, notices = complete_output(place, run, fill, mine, missing)
        outcome.notices += notices
    return outcome, share


def _made_of(
    base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, run: Run
) -> dict[str, Any]:
    """What an extraction is made of; see `WorkOrder`."""
    models = {"base": base, "tuned": tuned}
    return {
        "versions": versions("torch", "numpy"),
        "options": asdict(options),
        "device": run.device,
        **{name: describe_model(model) for name, model in models.items()},
        **{
            f"files of {name}": {} if origin_of(model.source) else known_files(*model.files)
            for name, model in models.items()
        },
    }


def _in_cluster(output: Path, extracting: Extracting, run: Run, verb: Callable[..., Any]) -> None:
    """Let the tasks of a cluster take apart the matrices that nobody has."""
    from loratool.extracting.output import share_of

    if run.device != "cpu":
        raise UsageError("Tasks of a cluster compute on CPUs.", "Omit --device, or use --worker.")
    pairs, advance = extracting.pairs, extracting.work.advance
    count = min(_TASKS, len(extracting.unknown()))
    shares = {
        f"{number}/{count}": WorkShare(number, count, completes=False)
        for number in range(1, count + 1)
    }
    if not shares:
        advance(sum(part.nbytes for part in pairs.found), str(output))
    for name in in_cluster(output, shares, run, verb):
        advance(sum(part.nbytes for part in share_of(pairs, shares[name])), name)
