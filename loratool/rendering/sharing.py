"""Show how far an output is that workers make side by side."""

from __future__ import annotations

from rich.table import Table

from loratool.rendering.terminal import verbatim
from loratool.streams.shares import SharedOut
from loratool.words import counted

#: Missing files that are named.
_NAMED = 5


def is_part(share: SharedOut | None) -> bool:
    """Whether a run made a part of an output and did not complete it."""
    return share is not None and (not share.complete or share.before)


def share_facts(facts: Table, share: SharedOut | None, output: str) -> None:
    """Add to a report what a worker did, and what is left for others."""
    assert share is not None
    facts.add_row("worker", f"{share.worker}, {counted(len(share.made), 'part')} of the output")
    if share.complete:
        facts.add_row("output", f"{verbatim(output)}, completed by another worker")
    elif share.missing:
        names = ", ".join(map(verbatim, share.missing[:_NAMED]))
        more = len(share.missing) - _NAMED
        names += f" and {more} more" if more > 0 else ""
        facts.add_row("missing", f"{counted(len(share.missing), 'part')}: {names}")
        facts.add_row("", "The last worker completes the output; if none runs: loratool finish")
