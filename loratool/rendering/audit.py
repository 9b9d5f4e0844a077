"""What an audit found, as pieces of a sheet: findings, what to do, and ranks as a chart."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from loratool.auditing.audit import Audit
from loratool.auditing.findings import AuditFinding
from loratool.auditing.spectra import ModuleAudit
from loratool.paths import pattern, ranged, ranged_names
from loratool.sheet import (
    Bars,
    Chart,
    Piece,
    Sentence,
    SheetLine,
    SheetTable,
    Toned,
    strong,
)
from loratool.words import counted

#: More kinds of modules than these make a chart that nobody reads.
_KINDS = 12

#: Findings that make an adapter unusable or useless where they are.
_GRAVE = ("not-finite", "dead")


def audit_pieces(audit: Audit) -> list[Piece]:
    """The audit as it follows after the facts of an adapter, whose own charts are the spectra and
    the norms by layer."""
    pieces: list[Piece] = [Sentence(_summary(audit))]
    if audit.findings:
        table = SheetTable(
            (("finding", "module", "count", "figure"), ("finding", "module", "figure")),
            numeric=frozenset({"count"}),
        )
        table.lines += map(_line, audit.findings)
        pieces.append(table)
    for remedy in audit.remedies:
        pieces.append(Sentence((strong(remedy.code), f": {remedy.advice}")))
        if remedy.command:
            pieces.append(Sentence(f"  {remedy.command}"))
    pieces += [Sentence(Toned(note, "dim")) for note in audit.notes]
    return [*pieces, *_ranks(audit.modules)]


def _summary(audit: Audit) -> tuple[str | Toned, ...]:
    looked = counted(len(audit.modules), "module")
    if not audit.findings:
        measured = sum(m.measured for m in audit.modules)
        if not measured:
            return strong("audit"), ": there was no product of factors to measure"
        if measured < len(audit.modules):
            looked = f"{measured:,} of {looked}, the others were not measured"
        return strong("audit"), f": nothing found in {looked}"
    codes = len(audit.remedies)
    found = {path for finding in audit.findings for path in finding.modules}
    where = sum(m.path in found for m in audit.modules)
    return strong("audit"), f": {counted(codes, 'sort')} of findings, in {where:,} of {looked}"


def _line(finding: AuditFinding) -> SheetLine:
    tone: Toned | str = finding.code
    if finding.code in _GRAVE:
        tone = Toned(finding.code, "bad")
    return SheetLine(
        {"finding": tone, "module": _names(finding.modules), "count": str(len(finding.modules)),
         "figure": finding.figure}
    )  # fmt: skip


def _names(paths: Sequence[str]) -> str:
    """Modules of one kind as one name, or the first of several names."""
    first, *others = ranged_names(paths)
    return first + (f" and {len(others)} more" if others else "")


def _ranks(modules: Sequence[ModuleAudit]) -> list[Chart]:
    """Ranks and what the spectra use of them, by kind of module: medians over the layers."""
    kinds: dict[str, list[ModuleAudit]] = defaultdict(list)
    for m in modules:
        if m.singular_values:
            kinds[pattern(m.path)].append(m)
    groups = list(kinds.values())[:_KINDS]
    if not groups:
        return []

    def medians(figure: Callable[[ModuleAudit], float | None]) -> list[float]:
        found = [[v for m in alike if (v := figure(m)) is not None] for alike in groups]
        return [statistics.median(values) if values else 0.0 for values in found]

    series = [
        ("rank", medians(lambda m: m.rank)),
        ("holds 99%", medians(lambda m: m.rank_enough)),
        ("effective rank", medians(lambda m: m.effective_rank)),
    ]
    if any(m.above_noise is not None for alike in groups for m in alike):
        series.append(("above noise", medians(lambda m: m.above_noise)))
    names = [ranged([m.path for m in alike]) for alike in groups]
    return [Bars("Ranks and what the spectra use of them", names, "rank", series)]
