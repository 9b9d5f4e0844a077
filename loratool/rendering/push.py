"""What `push` did or would do, as a sheet."""

from __future__ import annotations

from loratool.rendering.saying import first_of, sheet_of
from loratool.serving.programs import serving_line
from loratool.sheet import Facts, Line, Sheet, Toned, Words, table_of
from loratool.verbs.push import PushReport
from loratool.words import counted, format_bytes

#: A list of more files than this is cut.
_SHOWN = 40

_CARDS = {
    "made": "made from what the folder tells",
    "completed": "completed; what was written stays",
    "kept": "as it is",
}

_STATES: dict[str, Words] = {
    "new": "new", "changed": Toned("another version", "warning"), "there": Toned("the same", "dim"),
}  # fmt: skip


def push_sheet(report: PushReport) -> Sheet:
    sheet = sheet_of("push", report.dry_run, "uploaded")
    if report.dry_run:
        table = table_of("file", "size", "on the Hub")
        for file in report.files[:_SHOWN]:
            table.add(file.name, format_bytes(file.bytes), _STATES[file.state])
        sheet.add(table)
        if len(report.files) > _SHOWN:
            sheet.say(f"and {len(report.files) - _SHOWN} more files (--json lists all)")
    sheet.add(_facts(report))
    if not report.dry_run:
        sheet.add(Line(report.url))
    sheet.notices = report.warnings
    return sheet


def _facts(report: PushReport) -> Facts:
    facts = Facts()
    facts.add(report.kind, report.source)
    seen = "private" if report.private else "public"
    new = "to be created, " if report.dry_run else "created, "
    facts.add("repository", f"{report.repo} ({new if report.created else ''}{seen})")
    if report.revision != "main":
        facts.add("branch", report.revision)
    sent = [f for f in report.files if f.state != "there"]
    word = "to upload" if report.dry_run else "uploaded"
    same = len(report.files) - len(sent)
    there = f"; {same} the same there ({format_bytes(report.bytes_there)})" if same else ""
    files = counted(len(sent), "file")
    facts.add(word, f"{files}, {format_bytes(report.bytes_to_upload)}{there}")
    facts.add("model card", _CARDS[report.card])
    if report.serving:
        facts.add("serving", serving_line(report.serving))
    if report.left_out:
        facts.add("left out", first_of(report.left_out, 5))
    if not report.dry_run:
        none = f"none, nothing has changed since {report.commit[:12]}"
        facts.add("commit", report.commit if sent else none)
    return facts
