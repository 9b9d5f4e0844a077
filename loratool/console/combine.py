"""Show what `combine` made."""

from __future__ import annotations

from rich.markup import escape

from loratool.checkpoint.tensors import format_bytes
from loratool.combining import CombineReport
from loratool.console.changes import change_table, kept_text
from loratool.console.common import NARROW, fact_grid, out, percent_text


def show_combine(report: CombineReport, full: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add_row("adapter", escape(adapter) + (f"  × {weight:g}" if weight != 1 else ""))
    facts.add_row("method", report.method)
    facts.add_row("modules", f"{len(report.modules)}, rank {report.rank}")
    facts.add_row("kept", kept_text(report.kept, report.error))
    if report.rounding is not None:
        facts.add_row("rounding", f"took about {percent_text(report.rounding)} of the delta")
    if report.saved:
        more = f" and {len(report.saved) - 4} more" if len(report.saved) > 4 else ""
        facts.add_row("saved whole", escape(", ".join(report.saved[:4]) + more))
    size = f"{format_bytes(report.bytes_written)} ({report.dtype})"
    facts.add_row("to write" if report.dry_run else "written", f"{size}, {report.seconds:.1f} s")
    if not report.dry_run:
        facts.add_row("output", escape(report.output))
    out.print(facts)
    out.print()
    headings = ["module", "ranks", "new r", "out×in", "‖ΔW‖", "kept"]
    if out.width < NARROW:
        headings = ["module", "new r", "kept"]
    if any(m.from_sum is not None for m in report.modules):
        headings.append("off sum")
    out.print(change_table(headings, report.modules, full))
    if "off sum" in headings:
        out.print("\noff sum: ‖result − Σ weight·scale·B·A‖ / ‖Σ weight·scale·B·A‖", style="dim")
