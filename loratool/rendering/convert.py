"""Show what `convert` wrote or would write."""

from __future__ import annotations

from rich.table import Table

from loratool.adapters.dialects.writing import Fate
from loratool.rendering.terminal import fact_grid, folded_table, out, verbatim
from loratool.verbs.convert import ConvertReport
from loratool.words import counted, format_bytes, percent

_ORDER = ("exact", "rounded", "expanded", "cut")


def show_convert(report: ConvertReport, full: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    facts.add_row("adapter", verbatim(report.adapter))
    facts.add_row("dialect", f"{verbatim(report.dialect)} → {verbatim(report.to)}")
    counts = [(outcome, report.counts[outcome]) for outcome in _ORDER if outcome in report.counts]
    facts.add_row("parts", ", ".join(f"{count} {outcome}" for outcome, count in counts))
    if report.error is not None:
        facts.add_row("read back", _proof(report))
    size = f"{format_bytes(report.bytes)} ({', '.join(report.dtypes)}), {report.seconds:.1f} s"
    facts.add_row("size", size)
    if not report.dry_run:
        facts.add_row("output", verbatim(f"{report.output}/{report.file}"))
    out.print(facts)
    out.print()
    out.print(_table(report.fates, full))


def _proof(report: ConvertReport) -> str:
    if not report.error:
        return "[green]every product is what it was, to the last bit[/]"
    rounded = sum(1 for fate in report.fates if fate.error)
    verb = f"{counted(rounded, 'module', 'differs')} by at most {report.error:.2g} of ‖ΔW‖"
    return f"{verb}, the others not at all" if rounded < len(report.fates) else verb


def _table(fates: list[Fate], full: bool) -> Table:
    return folded_table(
        ["module", "r", "new r", "outcome", "error", "what was done"],
        fates,
        lambda fate: fate.what,
        lambda fate: (fate.outcome, fate.detail, fate.rank, fate.new_rank),
        _cells,
        full or len(fates) == 1,
        spare=("r", "what was done", "new r"),
    )


def _cells(group: list[Fate]) -> dict[str, str]:
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
