"""What `dequantise` wrote or would write, as a sheet."""

from __future__ import annotations

from loratool.rendering.merge import small_values
from loratool.rendering.saying import (
    is_part,
    push_facts,
    room_text,
    share_facts,
    sheet_of,
    written_text,
)
from loratool.sheet import Facts, Line, Sheet, Toned
from loratool.verbs.dequantise import DequantiseReport
from loratool.words import counted, format_bytes


def dequantise_sheet(report: DequantiseReport) -> Sheet:
    sheet = sheet_of("dequantise", report.dry_run)
    facts = Facts()
    facts.add("base", report.base)
    facts.add("quantised", f"{counted(report.weights, 'weight')} in {report.formats}")
    facts.add("dtype", "the model's own" if report.dtype == "base" else report.dtype)
    if report.left_out:
        facts.add("left out", ", ".join(report.left_out))
    if report.dry_run:
        facts.add("to read", format_bytes(report.bytes_to_read))
        facts.add("to write", room_text(report.bytes_needed, report.bytes_free, len(report.shards)))
        if report.range_loss is not None:
            facts.add("small values", small_values(report.range_loss))
        if report.pushed:
            facts.add("to push to", report.pushed)
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        _written(facts, report)
    sheet.add(facts)
    if report.pushed and not report.dry_run:
        sheet.add(Line(report.pushed))
    sheet.notices = report.warnings
    return sheet


def _written(facts: Facts, report: DequantiseReport) -> None:
    facts.add("written", written_text(report.bytes_written, len(report.shards), report.seconds))
    if report.subnormal or report.zeroed:
        text = f"{report.subnormal:,} became subnormal, {report.zeroed:,} became zero"
        facts.add("small values", text)
    if report.verified:
        facts.add("verified", Toned("every value read back as computed", "good"))
    if report.kept:
        facts.add("output", report.output)
    seen = ("created, " if report.created else "") + ("private" if report.private else "public")
    push_facts(facts, report.resumed, len(report.shards), report.pushed, seen, report.commit)
