"""What `merge` did or would do, as a sheet."""

from __future__ import annotations

from loratool.merging.initial import Derivation
from loratool.merging.range_loss import RangeLoss
from loratool.merging.report import MergeReport
from loratool.rendering.saying import (
    excluded_facts,
    first_of,
    is_part,
    push_facts,
    room_text,
    share_facts,
    sheet_of,
    weighted,
    written_text,
)
from loratool.sheet import Facts, Line, Sheet, Toned, Words
from loratool.storage.filenames import CONFIG
from loratool.words import format_bytes, percent

_DONE = {"merge": "merged", "replace": "replaced", "add": "added", "cast": "cast",
         "copy": "copied"}  # fmt: skip


def merge_sheet(report: MergeReport, verbose: bool = False) -> Sheet:
    sheet = sheet_of("merge", report.dry_run)
    facts = Facts()
    facts.add("base", report.base)
    given = zip(report.adapters, report.trained_on, report.weights, strict=True)
    for adapter, trained_on, weight in given:
        named = f"  (trained on {trained_on})" if trained_on else ""
        facts.add("adapter", weighted(adapter, weight) + named)
    if report.quantised:
        facts.add("quantised", report.quantised)
    facts.add("dtype", "each tensor's own" if report.dtype == "base" else report.dtype)
    if report.adapters:
        facts.add("modules", f"{report.modules} merged")
    excluded_facts(facts, report.adapters, report.excluded)
    _tensors(facts, report, verbose)
    if report.derivation is not None:
        facts.add("initialisation", _derivation(report.derivation))
    if report.kept_of_delta is not None:
        left = report.kept_of_delta
        kept_of_it = f"{percent(left.share)} of the delta (error {percent(left.error)})"
        said = f"would keep about {kept_of_it}, from a sample"
        facts.add("requantising", said if report.dry_run else f"kept {kept_of_it}")
    if report.config_changes:
        facts.add(CONFIG, ", ".join(f"{k} = {v}" for k, v in report.config_changes.items()))
    if report.tokenizer:
        facts.add("tokenizer", report.tokenizer)
    if report.left_out:
        facts.add("left out", ", ".join(report.left_out))
    if report.dry_run:
        _planned(facts, report)
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        _written(facts, report)
    if report.pushed and report.dry_run:
        facts.add("to push to", report.pushed)
    sheet.add(facts)
    if report.pushed and not report.dry_run:
        sheet.add(Line(report.pushed))
    sheet.notices = report.warnings
    return sheet


def _tensors(facts: Facts, report: MergeReport, verbose: bool) -> None:
    done = [f"{n} {_DONE[action]}" for action, n in report.tensors.items() if n]
    facts.add("tensors", ", ".join(done))
    for action in ("replace", "add"):
        names = report.changes[action]
        if names:
            facts.add(_DONE[action], first_of(names, len(names) if verbose else 5))
    if verbose:
        for number, name in enumerate(report.changes["merge"]):
            facts.add("" if number else "merged", name)


def _planned(facts: Facts, report: MergeReport) -> None:
    facts.add("to read", format_bytes(report.bytes_to_read))
    facts.add("to write", room_text(report.bytes_needed, report.bytes_free, len(report.shards)))
    if report.range_loss is not None:
        facts.add("small values", small_values(report.range_loss))
    if report.reversible:
        share = report.undo_bytes / max(1, report.bytes_written)
        undo = f"about {format_bytes(report.undo_bytes)} more ({share:.1%}), from a sample"
        facts.add("undo file", undo)


def _written(facts: Facts, report: MergeReport) -> None:
    facts.add("written", written_text(report.bytes_written, len(report.shards), report.seconds))
    if report.subnormal or report.zeroed:
        share = 100 * (report.subnormal + report.zeroed) / max(1, report.parameters)
        facts.add(
            "small values",
            f"{report.subnormal:,} became subnormal, {report.zeroed:,} became zero "
            f"({share:.2g}% of all)",
        )
    if report.kept_of_delta is None and report.lost is not None:
        facts.add("rounding", f"took about {percent(report.lost)} of the delta")
    if report.verified:
        facts.add("verified", Toned("every value read back as computed", "good"))
    if report.reversible:
        share = report.undo_bytes / max(1, report.bytes_written)
        undo = f"{format_bytes(report.undo_bytes)} ({share:.2%} of the output)"
        facts.add("undo file", undo)
    if report.kept:
        facts.add("output", report.output)
    seen = ("created, " if report.created else "") + ("private" if report.private else "public")
    push_facts(facts, report.resumed, len(report.shards), report.pushed, seen, report.commit)


def _derivation(cost: Derivation) -> str:
    name = {"pissa": "PiSSA", "olora": "OLoRA"}[cost.how]
    tera = float(f"{cost.flops / 1e12:.2g}")
    each = "its matrix" if cost.matrices == 1 else f"each of {cost.matrices} matrices"
    text = f"{name}: one decomposition of {each}, about {tera:,.6g} TFLOP in float64"
    if cost.seconds is None:
        return text
    units = ((3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((u for u in units if cost.seconds >= 1.5 * u[0]), units[-1])
    return f"{text}, about {max(1, round(cost.seconds / size))} {unit} here"


def small_values(lost: RangeLoss) -> Words:
    """What float16 would lose, in words."""
    text = (
        f"about {percent(lost.subnormal)} of the values lose digits in float16, "
        f"{percent(lost.zeroed)} become zero (from {lost.sampled:,} of them)"
    )
    if not lost.overflowing:
        return text
    stops = f"{percent(lost.overflowing)} overflow, which stops the merge"
    return f"{text}; ", Toned(stops, "bad")
