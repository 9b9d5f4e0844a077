"""Show what `combine` made."""

from __future__ import annotations

from loratool.rendering.ranks import change_table, cut_text, rank_text
from loratool.rendering.terminal import fact_grid, out, verbatim
from loratool.verbs.combine import CombineReport
from loratool.words import format_bytes, percent


def show_combine(report: CombineReport, full: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add_row("adapter", verbatim(adapter) + (f"  × {weight:g}" if weight != 1 else ""))
    facts.add_row("method", _method_text(report))
    ranks = rank_text([m.rank for m in report.modules])
    facts.add_row("modules", f"{len(report.modules)}, rank {ranks}")
    facts.add_row("cut", cut_text(report.kept, report.error))
    if report.from_sum is not None:
        facts.add_row("off sum", f"{percent(report.from_sum)} of the weighted sum's norm")
    if report.rounding is not None:
        facts.add_row("rounding", f"took about {percent(report.rounding)} of the delta")
    if report.saved:
        more = f" and {len(report.saved) - 4} more" if len(report.saved) > 4 else ""
        facts.add_row("saved whole", ", ".join(map(verbatim, report.saved[:4])) + more)
    size = f"{format_bytes(report.bytes_written)} ({report.dtype})"
    if report.dry_run:
        facts.add_row("to write", size)
    else:
        facts.add_row("written", f"{size}, {report.seconds:.1f} s")
    if not report.dry_run:
        facts.add_row("output", verbatim(report.output))
    out.print(facts)
    out.print()
    headings = ["module", "ranks", "new r", "out×in", "‖ΔW‖", "kept ≥"]
    if report.from_sum is not None:
        headings.append("off sum ≤")
    out.print(change_table(headings, report.modules, full))


def _method_text(report: CombineReport) -> str:
    """ "ties, density 0.5": the method and what it was told."""
    told = [
        f"{k} {v}" for k in ("density", "seed", "rank", "energy") if (v := report.options.get(k))
    ]
    return ", ".join([report.method, *told])
