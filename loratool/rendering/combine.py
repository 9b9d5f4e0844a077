"""What `combine` made, as a sheet."""

from __future__ import annotations

from loratool.rendering.ranks import change_charts, change_table, cut_text, rank_text
from loratool.rendering.saying import excluded_facts, first_of, sheet_of, weighted
from loratool.sheet import Facts, Sheet
from loratool.verbs.combine import CombineReport
from loratool.words import format_bytes, percent


def combine_sheet(report: CombineReport, full: bool = False) -> Sheet:
    sheet = sheet_of("combine", report.dry_run)
    facts = Facts()
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add("adapter", weighted(adapter, weight))
    excluded_facts(facts, report.adapters, report.excluded)
    facts.add("method", _method_text(report))
    ranks = rank_text([m.rank for m in report.modules])
    facts.add("modules", f"{len(report.modules)}, rank {ranks}")
    facts.add("cut", cut_text(report.kept, report.error))
    if report.from_sum is not None:
        facts.add("off sum", f"{percent(report.from_sum)} of the weighted sum's norm")
    if report.rounding is not None:
        facts.add("rounding", f"took about {percent(report.rounding)} of the delta")
    if report.saved:
        facts.add("saved whole", first_of(report.saved, 4))
    size = f"{format_bytes(report.bytes_written)} ({report.dtype})"
    if report.dry_run:
        facts.add("to write", size)
    else:
        facts.add("written", f"{size}, {report.seconds:.1f} s")
        facts.add("output", report.output)
    headings = ["module", "ranks", "new r", "out×in", "‖ΔW‖", "kept ≥"]
    if report.from_sum is not None:
        headings.append("off sum ≤")
    sheet.add(facts, change_table(headings, report.modules, full), *change_charts(report.modules))
    sheet.notices = report.warnings
    return sheet


def _method_text(report: CombineReport) -> str:
    """ "ties, density 0.5": the method and what it was told."""
    told = [
        f"{k} {v}" for k in ("density", "seed", "rank", "energy") if (v := report.options.get(k))
    ]
    return ", ".join([report.method, *told])
