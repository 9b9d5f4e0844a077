"""Show what `unmerge` did or would do."""

from __future__ import annotations

from loratool.rendering.sharing import is_part, share_facts
from loratool.rendering.terminal import fact_grid, out, verbatim, written_text
from loratool.verbs.unmerging import UnmergeReport
from loratool.words import counted, format_bytes


def show_unmerge(report: UnmergeReport) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    facts.add_row("merged", verbatim(report.merged))
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add_row("without", verbatim(adapter) + (f"  × {weight:g}" if weight != 1 else ""))
    for name in report.remaining:
        facts.add_row("stays", verbatim(name))
    facts.add_row("modules", f"{report.modules} taken back")
    if report.undo_bytes:
        checked = "will be checked" if report.dry_run else "checked"
        text = f"bit for bit, the hash of {counted(report.tensors, 'tensor')} {checked}"
        facts.add_row("exact", f"[green]{text}[/]")
        facts.add_row("undo file", format_bytes(report.undo_bytes))
    elif report.exact:
        facts.add_row("exact", "[green]all tensors are copies of the base's[/]")
    else:
        facts.add_row("exact", "[yellow]no: subtracted and rounded once more[/]")
        facts.add_row("dtype", "each tensor's own" if report.dtype == "base" else report.dtype)
        if report.expected_changed is not None:
            share = f"about {report.expected_changed:.2%} of the adapted weights"
            facts.add_row("lost", f"{share} differ from those before the merge, each by at most "
                          "half a unit in the last place of the merged value and half of the "
                          "result's")  # fmt: skip
    if report.copied_from_base:
        facts.add_row("copied", f"{counted(report.copied_from_base, 'tensor')} from the base")
    if report.dry_run:
        free = format_bytes(report.bytes_free)
        facts.add_row("to write", f"{format_bytes(report.bytes_written)} of {free} free")
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        facts.add_row(
            "written", written_text(report.bytes_written, len(report.shards), report.seconds)
        )
        facts.add_row("output", verbatim(report.output))
    out.print(facts)
