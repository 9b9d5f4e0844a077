"""What `resize` made, as a sheet."""

from __future__ import annotations

from loratool.rendering.ranks import change_charts, change_table, cut_text, rank_text
from loratool.rendering.saying import sheet_of
from loratool.sheet import Facts, Sheet
from loratool.verbs.resize import ResizeReport
from loratool.words import format_bytes, percent


def resize_sheet(report: ResizeReport, full: bool = False) -> Sheet:
    sheet = sheet_of("resize", report.dry_run)
    sheet.subject = report.adapter
    facts = Facts()
    facts.add("adapter", report.adapter)
    facts.add("modules", str(len(report.modules)))
    facts.add("rank", f"{rank_text([m.ranks[0] or 0 for m in report.modules])} → "
              f"{rank_text([m.rank for m in report.modules])}")  # fmt: skip
    facts.add("cut", cut_text(report.kept, report.error))
    if report.rounding is not None:
        facts.add("rounding", f"took about {percent(report.rounding)} of the delta")
    size = f"{format_bytes(report.bytes_before)} → {format_bytes(report.bytes_written)}"
    facts.add("size", f"{size} ({report.dtype}), {report.seconds:.1f} s")
    if not report.dry_run:
        facts.add("output", report.output)
    headings = ["module", "r", "new r", "out×in", "‖ΔW‖", "kept ≥", "error ≤"]
    sheet.add(facts, change_table(headings, report.modules, full), *change_charts(report.modules))
    sheet.notices = report.warnings
    return sheet
