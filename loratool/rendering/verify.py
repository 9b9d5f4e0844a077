"""What `verify` found, as a sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from loratool.merging.proof.findings import Finding
from loratool.paths import pattern, ranged, split
from loratool.rendering.charts import by_layer
from loratool.rendering.saying import excluded_facts, weighted
from loratool.sheet import (
    Bars,
    Chart,
    Facts,
    Sheet,
    SheetLine,
    SheetTable,
    Toned,
    Words,
)
from loratool.verbs.verify import VerifyReport
from loratool.words import counted, format_bytes, number_text, percent

_COLUMNS = ("module", "finding", "weight", "equal", "lost", "unexplained", "values off",
            "max ulp", "max dev.")  # fmt: skip


def verify_sheet(report: VerifyReport, full: bool = False) -> Sheet:
    sheet = Sheet("verify", subject=report.merged)
    facts = Facts()
    facts.add("merged", report.merged)
    facts.add("base", report.base)
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add("adapter", weighted(adapter, weight))
    excluded_facts(facts, report.adapters, report.excluded)
    if report.findings:
        equal = f"{percent(report.equal)} of the adapted weights have the once-rounded value"
        facts.add("equal", equal)
        facts.add("untouched", f"{counted(report.untouched, 'tensor')} as in the base")
    if report.lost is not None:
        facts.add("rounding", f"took {percent(report.lost)} of the delta")
    if report.bytes_read:
        rate = ""
        if report.bytes_read > 100e6:
            rate = f", {format_bytes(report.bytes_read / max(report.seconds, 1e-9))}/s"
        facts.add("read", f"{format_bytes(report.bytes_read)}, {report.seconds:.1f} s{rate}")
    sheet.add(facts)
    shown = [f for f in report.findings if f.adapted]
    if shown:
        sheet.add(_table(shown, full or len(shown) == 1))
    for sentence in report.summary:
        plain = sentence.partition(" ")[0].isalpha()  # a path keeps its first letter
        said = (sentence[0].upper() + sentence[1:] if plain else sentence) + "."
        for line in said.split("\n"):
            sheet.say(line)
    if report.verdict == "yes":
        sheet.say(Toned("yes:", "good"), " the merged model is base + adapters")
    else:
        sheet.say(Toned("no:", "bad"), " the merged model is not base + adapters")
    sheet.add(*_charts(shown))
    sheet.notices = report.warnings
    return sheet


def _table(findings: Sequence[Finding], full: bool) -> SheetTable:
    """One line per group of tensors with one finding, under their layers."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    layers: dict[str, list[str]] = {}
    for f in findings:
        key = (f.module,) if full else (pattern(f.module), f.code)
        groups.setdefault(key, []).append(f)
        head = split(f.module)[0]
        layers.setdefault(pattern(head), []).append(head)
    table = SheetTable((_COLUMNS, _COLUMNS[:6]), spare=("unexplained", "lost", "equal"))
    section = ""
    for group in groups.values():
        head, leaf = split(ranged([f.module for f in group]))
        everywhere = head if full else ranged(layers[pattern(split(group[0].module)[0])])
        if everywhere != section and head:
            table.lines.append(SheetLine({"module": everywhere}, is_section=True))
        section = everywhere
        if head != everywhere:  # only some of the layers
            leaf += " " + head.rpartition(".")[2]
        table.lines.append(SheetLine({"module": ("  " if head else "") + leaf, **_cells(group)}))
    return table


def _cells(group: Sequence[Finding]) -> dict[str, Words]:
    code = group[0].code
    return {
        "finding": code if group[0].sound else Toned(code, "bad"),
        "weight": _weights([f.applied for f in group]),
        "equal": percent(min(f.equal for f in group)),
        "lost": _percents([f.lost for f in group]),
        "unexplained": _percents([f.unexplained for f in group]),
        "values off": f"{sum(f.off for f in group):,}",
        "max ulp": f"{max(f.largest_ulp for f in group):,}",
        "max dev.": number_text(max(f.largest for f in group), 2),
    }


def _charts(findings: Sequence[Finding]) -> list[Chart]:
    """Where the values are not those expected, and how far off."""
    if not findings:
        return []
    unequal = [(f.module, 1 - f.equal) for f in findings]
    charts = by_layer("Values that are not the once-rounded ones", "share of the values", unequal)
    charts += by_layer("Lost of the delta", "of ‖ΔW‖", [(f.module, f.lost) for f in findings])
    counts: Counter[str] = Counter()
    for finding in findings:
        counts.update(finding.ulps)
    if counts:
        labels = [end if end in ("0", "1", "more") else f"≤ {end}" for end in counts]
        title = "How far values are off, in units in the last place"
        numbers = [float(n) for n in counts.values()]
        charts.append(Bars(title, labels, "values", [("values", numbers)], log_y=True))
    return charts


def _percents(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return percent(max(known)) if known else "–"


def _weights(values: Sequence[float | None]) -> str:
    rounded = sorted({round(v, 2) + 0.0 for v in values if v is not None})
    shown = [f"{v:.2f}" for v in rounded]
    if len(shown) < 2:
        return "".join(shown) or "–"
    return f"{shown[0]} to {shown[-1]}" if rounded[0] < 0 else f"{shown[0]}–{shown[-1]}"
