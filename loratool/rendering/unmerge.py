"""What `unmerge` did or would do, as a sheet."""

from __future__ import annotations

from loratool.rendering.saying import (
    excluded_facts,
    is_part,
    share_facts,
    sheet_of,
    weighted,
    written_text,
)
from loratool.sheet import Facts, Sheet, Toned
from loratool.verbs.unmerging import UnmergeReport
from loratool.words import counted, format_bytes


def unmerge_sheet(report: UnmergeReport) -> Sheet:
    sheet = sheet_of("unmerge", report.dry_run)
    facts = Facts()
    facts.add("merged", report.merged)
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add("without", weighted(adapter, weight))
    for name in report.remaining:
        facts.add("stays", name)
    facts.add("modules", f"{report.modules} taken back")
    excluded_facts(facts, report.adapters, report.excluded)
    _exactness(facts, report)
    if report.copied_from_base:
        facts.add("copied", f"{counted(report.copied_from_base, 'tensor')} from the base")
    if report.dry_run:
        free = format_bytes(report.bytes_free)
        facts.add("to write", f"{format_bytes(report.bytes_written)} of {free} free")
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        facts.add("written", written_text(report.bytes_written, len(report.shards), report.seconds))
        facts.add("output", report.output)
    sheet.add(facts)
    sheet.notices = report.warnings
    return sheet


def _exactness(facts: Facts, report: UnmergeReport) -> None:
    if report.undo_bytes:
        checked = "will be checked" if report.dry_run else "checked"
        text = f"bit for bit, the hash of {counted(report.tensors, 'tensor')} {checked}"
        facts.add("exact", Toned(text, "good"))
        facts.add("undo file", format_bytes(report.undo_bytes))
    elif report.exact:
        facts.add("exact", Toned("all tensors are copies of the base's", "good"))
    else:
        facts.add("exact", Toned("no: subtracted and rounded once more", "warning"))
        facts.add("dtype", "each tensor's own" if report.dtype == "base" else report.dtype)
        if report.expected_changed is not None:
            share = f"about {report.expected_changed:.2%} of the adapted weights"
            facts.add("lost", f"{share} differ from those before the merge, each by at most "
                      "half a unit in the last place of the merged value and half of the "
                      "result's")  # fmt: skip
