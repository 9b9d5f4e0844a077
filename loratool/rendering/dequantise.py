"""Show what `dequantise` wrote or would write."""

from __future__ import annotations

from loratool.rendering.merge import small_values
from loratool.rendering.sharing import is_part, share_facts
from loratool.rendering.terminal import fact_grid, out, verbatim, written_text
from loratool.verbs.dequantise import DequantiseReport
from loratool.words import counted, format_bytes


def show_dequantise(report: DequantiseReport) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    facts.add_row("base", verbatim(report.base))
    facts.add_row("quantised", f"{counted(report.weights, 'weight')} in {verbatim(report.formats)}")
    facts.add_row("dtype", "the model's own" if report.dtype == "base" else report.dtype)
    if report.left_out:
        facts.add_row("left out", ", ".join(map(verbatim, report.left_out)))
    if report.dry_run:
        facts.add_row("to read", format_bytes(report.bytes_to_read))
        free = format_bytes(report.bytes_free)
        room = "" if report.bytes_free > report.bytes_needed else " [bold red](not enough)[/]"
        facts.add_row("to write", f"{format_bytes(report.bytes_needed)} of {free} free{room}")
        if report.range_loss is not None:
            facts.add_row("small values", small_values(report.range_loss))
        if report.pushed:
            facts.add_row("to push to", verbatim(report.pushed))
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        facts.add_row(
            "written", written_text(report.bytes_written, len(report.shards), report.seconds)
        )
        if report.subnormal or report.zeroed:
            text = f"{report.subnormal:,} became subnormal, {report.zeroed:,} became zero"
            facts.add_row("small values", text)
        if report.verified:
            facts.add_row("verified", "[green]every value read back as computed[/]")
        if report.kept:
            facts.add_row("output", verbatim(report.output))
        if report.resumed:
            count = f"{len(report.resumed)} of {len(report.shards)} shards"
            facts.add_row("resumed", f"{count} were there from an earlier run")
        if report.pushed:
            seen = "private" if report.private else "public"
            facts.add_row("repository", f"{'created, ' if report.created else ''}{seen}")
            facts.add_row("commit", verbatim(report.commit))
    out.print(facts)
    if report.pushed and not report.dry_run:
        out.print(verbatim(report.pushed), soft_wrap=True)
