"""What `lint` found, as a sheet: what each program makes of an adapter, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.serving.together import Together
from loratool.serving.verdict import Served, Verdict
from loratool.sheet import (
    CodeBlock,
    Facts,
    HeatMap,
    Sheet,
    SheetTable,
    Tone,
    Toned,
    Words,
    strong,
    table_of,
)
from loratool.verbs.lint import AdapterLint, LintReport
from loratool.words import enumerated, format_bytes

_VERDICTS: Mapping[Served, tuple[str, Tone]] = {
    "loads": ("loads", "good"),
    "differs": ("another result", "bad"),
    "refused": ("refused", "bad"),
    "unknown": ("not known", "warning"),
}
#: On the scale of the chart, where what is above zero is red, as what is bad is in the table.
_SCALE: Mapping[Served, float] = {"loads": -1.0, "unknown": 0.3, "differs": 0.7, "refused": 1.0}


def lint_sheet(report: LintReport) -> Sheet:
    """The answer for all adapters that could be read."""
    read = [found for found in report.adapters if isinstance(found, AdapterLint)]
    sheet = Sheet("lint", subject=report.sources[0] if len(report.sources) == 1 else "")
    for one in read:
        _add_adapter(sheet, one)
    if len(read) > 1:
        sheet.add(_chart(read))
    if report.together is not None:
        _add_together(sheet, report.together)
    return sheet


def _add_adapter(sheet: Sheet, found: AdapterLint) -> None:
    facts = Facts()
    facts.add("adapter", strong(found.source))
    facts.add("format", found.description)
    sheet.add(facts)
    table = SheetTable((
        ("program", "version", "verdict", "seen in", "why"), ("program", "verdict", "why"),
    ))  # fmt: skip
    for verdict in (*found.verdicts, found.merge):
        word, tone = _VERDICTS[verdict.outcome]
        seen = ["a run" if remark.ran else "its source" for remark in verdict.troubles[:1]]
        table.add(verdict.title, verdict.version, Toned(word, tone), "".join(seen), _why(verdict))
    sheet.add(table)
    for command, titles in _mends(found).items():
        sheet.say(f"{enumerated(titles)}:", apart=True)
        sheet.add(CodeBlock("sh", [command]))


def _why(verdict: Verdict) -> Words:
    said = "; ".join(verdict.reasons)
    conditions = [Toned(f"if: {text}", "dim") for text in verdict.conditions] * (not said)
    return said or tuple(part for text in conditions for part in (text, "; "))[:-1]


def _mends(found: AdapterLint) -> dict[str, list[str]]:
    """The programs that each command mends it for."""
    mends: dict[str, list[str]] = {}
    for verdict in found.verdicts:
        if verdict.mend:
            mends.setdefault(verdict.mend, []).append(verdict.title)
    return mends


def _chart(read: list[AdapterLint]) -> HeatMap:
    return HeatMap(
        "Which program loads which adapter",
        [one.source for one in read],
        [verdict.title for verdict in read[0].verdicts],
        [[_SCALE[verdict.outcome] for verdict in one.verdicts] for one in read],
        "-1 loads, 1 refused", across="program", middle=0.0,
    )  # fmt: skip


def _add_together(sheet: Sheet, found: Together) -> None:
    facts = Facts()
    facts.add("together", f"largest rank {found.largest_rank}, {format_bytes(found.nbytes)}")
    facts.add("targets", ", ".join(found.targets))
    facts.add("dtypes", _counts(found.dtypes))
    facts.add("bases", _counts(found.bases))
    sheet.add(facts)
    table = table_of("program", "together", "start, or why not")
    for company in found.companies:
        word = Toned("no", "bad") if company.apart else Toned("yes", "good")
        table.add(company.title, word, "; ".join(company.apart) or company.start)
    sheet.add(table)


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in numbers.items())
