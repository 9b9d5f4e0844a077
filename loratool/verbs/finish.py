"""finish: put an output into its place that workers have made file by file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.answers import Answer
from loratool.errors import FileError, OutputError, explained_os_errors
from loratool.notices import Notice, document
from loratool.storage.destination import Overwrite
from loratool.storage.filenames import PROVENANCE
from loratool.storage.worksites import order_for, work_of
from loratool.streams.progress import Progress
from loratool.streams.shares import NO_SHARE
from loratool.verbs.dequantise import dequantise
from loratool.verbs.extract import extract
from loratool.verbs.making import make_share
from loratool.verbs.merge import merge
from loratool.verbs.unmerge import unmerge

#: What can be split up, by the command's name.
_VERBS: Mapping[str, Callable[..., Any]] = {
    "merge": merge, "unmerge": unmerge, "dequantise": dequantise, "extract": extract,
}  # fmt: skip


@dataclass(repr=False)
class FinishReport(Answer):
    """An output that was complete before, as the last worker leaves it."""

    output: str
    complete: bool = True
    warnings: list[Notice] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self, "warnings")


@explained_os_errors()
def finish(
    output: str | Path,
    *,
    overwrite: Overwrite | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Complete an output whose files workers have made, and put it into its place.

    Parameters
    ----------
    output: where they were told to make it. What else they were told is known from their folder.
    overwrite: replace an output that exists; as the workers were told by default.
    threads, progress: as for the command that makes it.

    Returns the report of that command; a FinishReport where nothing was left to be done.

    Raises
    ------
    OutputError: no worker has made anything for this output, or not all files are finished; the
    message names them. All that the command itself raises.
    """
    output = Path(output)
    order = order_for(output)
    if order is None and (output / PROVENANCE).is_file():
        return FinishReport(str(output))
    if order is None:
        raise OutputError(
            f"Nothing is being made for {output}: there is no {work_of(output).name} beside it.",
            "Give the output that the workers were told; run them first (--worker 1/N).",
        )
    verb = _VERBS.get(order.command)
    if verb is None:
        raise FileError(
            f"{work_of(output)}: it is of another loratool, which can {order.command}.",
            "Use that version.",
        )
    more = {} if overwrite is None else {"overwrite": overwrite}
    return make_share(verb, output, NO_SHARE, threads=threads, progress=progress, **more)
