"""Facts that several commands tell: adapters, what was written, how far workers are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratool.paths import ranged_names
from loratool.sheet import Facts, Sheet, SheetTable, Toned, Words, strong, table_of
from loratool.streams.shares import SharedOut
from loratool.words import counted, format_bytes, number_text

#: Missing files that are named.
_NAMED = 5


def sheet_of(command: str, dry_run: bool = False, undone: str = "written") -> Sheet:
    """The sheet of a command, which says first whether it only planned."""
    sheet = Sheet(command)
    if dry_run:
        sheet.say(strong("Plan"), f" (nothing was {undone})")
    return sheet


def weighted(name: str, weight: float | str) -> str:
    """A name, and what it was multiplied with."""
    return name + (f"  × {weight_text(weight)}" if weight != 1 else "")


def weight_text(weight: float | str) -> str:
    return weight if isinstance(weight, str) else f"{weight:g}"


def first_of(names: Sequence[str], count: int) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def excluded_facts(
    facts: Facts, adapters: Sequence[str], excluded: Sequence[Sequence[str]]
) -> None:
    """What was left out of each adapter, because nobody wanted it."""
    for adapter, parts in zip(adapters, excluded, strict=True):
        if parts:
            of = f" of {adapter}" if len(adapters) > 1 else ""
            named = first_of(ranged_names(parts), _NAMED)
            facts.add("excluded", f"{counted(len(parts), 'part')}{of}: {named}")


def written_text(nbytes: int, files: int, seconds: float) -> str:
    # The seconds include the import of torch, which says nothing about small models' speed.
    rate = f" ({format_bytes(nbytes / max(seconds, 1e-9))}/s)" if nbytes > 100e6 else ""
    return f"{format_bytes(nbytes)} in {counted(files, 'file')}, {seconds:.1f} s{rate}"


def room_text(needed: int, free: int, files: int) -> Words:
    """Bytes to write, in how many files of weights, and whether there is room for them."""
    room = Toned("" if free > needed else " (not enough)", "bad")
    parts = counted(files, "file")
    return f"{format_bytes(needed)} in {parts}, {format_bytes(free)} free", room


def push_facts(
    facts: Facts, resumed: Sequence[str], shards: int, pushed: str, seen: str, commit: str
) -> None:
    """What went to the Hub. `seen` says of the repository who sees it, and whether it is new."""
    if resumed:
        facts.add("resumed", f"{len(resumed)} of {shards} shards were there from an earlier run")
    if pushed:
        facts.add("repository", seen)
        facts.add("commit", commit)


def is_part(share: SharedOut | None) -> bool:
    """Whether a run made a part of an output and did not complete it."""
    return share is not None and (not share.complete or share.before)


def share_facts(facts: Facts, share: SharedOut | None, output: str) -> None:
    """Add to a report what a worker did, and what is left for others."""
    assert share is not None
    facts.add("worker", f"{share.worker}, {counted(len(share.made), 'part')} of the output")
    if share.complete:
        facts.add("output", f"{output}, completed by another worker")
    elif share.missing:
        missing = counted(len(share.missing), "part")
        facts.add("missing", f"{missing}: {first_of(share.missing, _NAMED)}")
        facts.add("", "The last worker completes the output; if none runs: loratool finish")


def spectrum_table(spectra: Iterable[tuple[str, Sequence[float]]], heading: str) -> SheetTable:
    """The singular values of every module as a line of bars, with the first and the last."""
    table = table_of("module", heading, "σ₁", "σᵣ")
    for path, values in spectra:
        first, last = (number_text(values[0]), number_text(values[-1])) if values else ("–", "–")
        table.add(path, _bars(values), first, last)
    return table


def _bars(values: Sequence[float], width: int = 16) -> str:
    """Singular values as a line of bars, the first one full height."""
    if not values or values[0] <= 0:
        return "–"
    step = -(-len(values) // width)
    shown = values[::step]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * v / values[0]))] for v in shown)
