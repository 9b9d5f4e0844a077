"""What `convert` wrote or would write, as a sheet."""

from __future__ import annotations

from loratool.adapters.dialects.writing import Fate
from loratool.rendering.saying import excluded_facts, sheet_of
from loratool.sheet import Facts, Sheet, SheetTable, Toned, Words, folded_lines
from loratool.verbs.convert import ConvertReport
from loratool.words import counted, format_bytes, percent

_ORDER = ("exact", "rounded", "expanded", "cut")


def convert_sheet(report: ConvertReport, full: bool = False) -> Sheet:
    sheet = sheet_of("convert", report.dry_run)
    facts = Facts()
    facts.add("adapter", report.adapter)
    excluded_facts(facts, [report.adapter], report.excluded)
    facts.add("dialect", f"{report.dialect} → {report.to}")
    counts = [(outcome, report.counts[outcome]) for outcome in _ORDER if outcome in report.counts]
    facts.add("parts", ", ".join(f"{count} {outcome}" for outcome, count in counts))
    if report.error is not None:
        facts.add("read back", _proof(report))
    size = f"{format_bytes(report.bytes)} ({', '.join(report.dtypes)}), {report.seconds:.1f} s"
    facts.add("size", size)
    if not report.dry_run:
        facts.add("output", f"{report.output}/{report.file}")
    sheet.add(facts, _table(report.fates, full))
    sheet.notices = report.warnings
    return sheet


def _proof(report: ConvertReport) -> Words:
    if not report.error:
        return Toned("every product is what it was, to the last bit", "good")
    rounded = sum(1 for fate in report.fates if fate.error)
    verb = f"{counted(rounded, 'module', 'differs')} by at most {report.error:.2g} of ‖ΔW‖"
    return f"{verb}, the others not at all" if rounded < len(report.fates) else verb


def _table(fates: list[Fate], full: bool) -> SheetTable:
    lines = folded_lines(
        fates,
        lambda fate: fate.what,
        lambda fate: (fate.outcome, fate.detail, fate.rank, fate.new_rank),
        _cells,
        full or len(fates) == 1,
    )
    headings = ("module", "r", "new r", "outcome", "error", "what was done")
    return SheetTable((headings,), lines, ("r", "what was done", "new r"))


def _cells(group: list[Fate]) -> dict[str, Words]:
    first = group[0]
    errors = [fate.error for fate in group if fate.error is not None]
    return {
        "r": "–" if first.rank is None else str(first.rank),
        "new r": "–" if first.new_rank is None else str(first.new_rank),
        "outcome": first.outcome,
        "error": _error(errors),
        "what was done": first.detail,
    }


def _error(errors: list[float]) -> str:
    if not errors:
        return "–"
    largest = max(errors)
    return percent(largest) if largest >= 1e-3 else f"{largest:.1g}"
