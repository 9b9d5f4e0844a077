"""Show what `resize` made."""

from __future__ import annotations

from loratool.rendering.ranks import change_table, cut_text, rank_text
from loratool.rendering.terminal import fact_grid, out, verbatim
from loratool.verbs.resize import ResizeReport
from loratool.words import format_bytes, percent


def show_resize(report: ResizeReport, full: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    facts.add_row("adapter", verbatim(report.adapter))
    facts.add_row("modules", str(len(report.modules)))
    facts.add_row("rank", f"{rank_text([m.ranks[0] or 0 for m in report.modules])} → "
                  f"{rank_text([m.rank for m in report.modules])}")  # fmt: skip
    facts.add_row("cut", cut_text(report.kept, report.error))
    if report.rounding is not None:
        facts.add_row("rounding", f"took about {percent(report.rounding)} of the delta")
    size = f"{format_bytes(report.bytes_before)} → {format_bytes(report.bytes_written)}"
    facts.add_row("size", f"{size} ({report.dtype}), {report.seconds:.1f} s")
    if not report.dry_run:
        facts.add_row("output", verbatim(report.output))
    out.print(facts)
    out.print()
    headings = ["module", "r", "new r", "out×in", "‖ΔW‖", "kept ≥", "error ≤"]
    out.print(change_table(headings, report.modules, full))
