"""Show what `push` did or would do."""

from __future__ import annotations

from loratool.rendering.terminal import fact_grid, make_table, out, verbatim
from loratool.verbs.push import PushReport
from loratool.words import counted, format_bytes

#: A list of more files than this is cut.
_SHOWN = 40

_CARDS = {
    "made": "made from what the folder tells",
    "completed": "completed; what was written stays",
    "kept": "as it is",
}


def show_push(report: PushReport) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was uploaded)")
        table = make_table("file", "size", "on the Hub")
        words = {"new": "new", "changed": "[yellow]another version[/]", "there": "[dim]the same[/]"}
        for file in report.files[:_SHOWN]:
            table.add_row(verbatim(file.name), format_bytes(file.bytes), words[file.state])
        out.print(table)
        if len(report.files) > _SHOWN:
            out.print(f"and {len(report.files) - _SHOWN} more files (--json lists all)")
        out.print()
    facts = fact_grid()
    facts.add_row(report.kind, verbatim(report.source))
    seen = "private" if report.private else "public"
    new = "to be created, " if report.dry_run else "created, "
    facts.add_row("repository", f"{verbatim(report.repo)} ({new if report.created else ''}{seen})")
    if report.revision != "main":
        facts.add_row("branch", verbatim(report.revision))
    sent = [f for f in report.files if f.state != "there"]
    word = "to upload" if report.dry_run else "uploaded"
    same = len(report.files) - len(sent)
    there = f"; {same} the same there ({format_bytes(report.bytes_there)})" if same else ""
    files = counted(len(sent), "file")
    facts.add_row(word, f"{files}, {format_bytes(report.bytes_to_upload)}{there}")
    facts.add_row("model card", _CARDS[report.card])
    if report.left_out:
        more = f" and {len(report.left_out) - 5} more" if len(report.left_out) > 5 else ""
        facts.add_row("left out", ", ".join(map(verbatim, report.left_out[:5])) + more)
    if not report.dry_run:
        none = f"none, nothing has changed since {report.commit[:12]}"
        facts.add_row("commit", verbatim(report.commit if sent else none))
    out.print(facts)
    if not report.dry_run:
        out.print(verbatim(report.url), soft_wrap=True)
