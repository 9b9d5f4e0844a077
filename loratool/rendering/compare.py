"""What `compare` found, as a sheet."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.combining.relations import ModuleRelations, Relation
from loratool.rendering.charts import by_layer
from loratool.rendering.saying import weight_text, weighted
from loratool.sheet import (
    Facts,
    HeatMap,
    Points,
    Sheet,
    SheetTable,
    Toned,
    Words,
    folded_lines,
    strong,
    table_of,
)
from loratool.verbs.compare import CompareReport, letter
from loratool.words import counted, number_text, percent, span_text

_SHOWN = 5

#: From this many adapters on, pairs that have nothing to do with each other are only counted.
_MANY = 4

_HELD = "1 undisturbed, 0 cancelled"

#: Pairs, and adapters, that have charts by layer of their own.
_CHARTED = 3


def compare_sheet(report: CompareReport, full: bool = False, equal: bool = False) -> Sheet:
    """With `equal` all that keeps the adapters from being equal is listed, and whether they are."""
    sheet = Sheet("compare")
    names = [letter(i) for i in range(len(report.adapters))]
    facts = Facts()
    for name, adapter, weight, norm in zip(
        names, report.adapters, report.weights, report.norms, strict=True
    ):
        facts.add(name, f"{weighted(adapter, weight)}, ‖Δ‖ {number_text(norm)}")
    if report.base is not None:
        facts.add("base", report.base)
    sheet.add(facts, _module_table(report, names, full))
    if report.base is not None:
        sheet.say("intruders: of the ten largest singular vectors those the base lacks")
    if len(names) > 2:
        sheet.add(_matrix(report, names))
    _say_verdicts(sheet, report, names)
    if report.sum_share is not None:
        sheet.say(_sum_sentence(report, names))
    lines = report.differing if equal else report.differing_beside
    if lines:
        sheet.say("Different:" if equal else "Beside the factors:", apart=True)
        sheet.add(Points(lines[:_SHOWN]))
        if len(lines) > _SHOWN:
            sheet.say(f"  … and {len(lines) - _SHOWN} more (--json lists all)")
    if equal:
        word = Toned("equal", "good") if report.equal else Toned("not equal", "bad")
        sheet.say(word, f" within {report.tolerance:g}")
    _add_charts(sheet, report, names)
    sheet.notices = report.warnings
    return sheet


def _module_table(report: CompareReport, names: Sequence[str], full: bool) -> SheetTable:
    count = len(names)
    held = [f"{name} in sum" for name in names]
    cosine = "cos" if count == 2 else "cos of pairs"
    both = ["‖A‖", "‖B‖", "‖B‖/‖A‖", "writes", "reads"] if count == 2 else []
    intruders = "intruders " + "/".join(names)
    headings = ["module", cosine, *both, *held]
    if report.base is not None:
        headings.append(intruders)

    def cells(group: list[ModuleRelations]) -> dict[str, Words]:
        pairs = [p for m in group for p in m.pairs]
        line: dict[str, Words] = {
            cosine: _span([p.cosine for p in pairs]),
            "‖A‖": span_text([m.norms[0] for m in group]),
            "‖B‖": span_text([m.norms[1] for m in group]),
            "‖B‖/‖A‖": span_text([p.ratio for p in pairs]),
            "writes": _percents([p.output_overlap for p in pairs]),
            "reads": _percents([p.input_overlap for p in pairs]),
            intruders: " / ".join(_intruders(group, i) for i in range(count)),
        }
        return line | {h: _span([m.survival[i] for m in group]) for i, h in enumerate(held)}

    lines = folded_lines(
        report.modules, lambda m: m.path,
        lambda m: (m.kind, tuple(r is None for r in m.ranks)), cells,
        full or len(report.modules) == 1,
    )  # fmt: skip
    spare = ("‖A‖", "‖B‖", "‖B‖/‖A‖", *reversed(held), "reads", "writes", cosine)
    return SheetTable((tuple(headings),), lines, spare)


def _add_charts(sheet: Sheet, report: CompareReport, names: Sequence[str]) -> None:
    """Cosines of all pairs, and by layer; what the weighted sum holds of each adapter."""
    count = len(names)
    if count > 2:
        cosines = {(p.a, p.b): p.cosine for p in report.pairs}
        rows = [
            [1.0 if i == j else cosines[min(i, j), max(i, j)] for j in range(count)]
            for i in range(count)
        ]
        sheet.add(HeatMap("Cosines of the deltas", names, names, rows, "cosine", middle=0.0))
    for number, pair in enumerate(report.pairs[:_CHARTED]):
        title = f"Cosine of {names[pair.a]} and {names[pair.b]}"
        values = [
            (m.path, next((p.cosine for p in m.pairs if (p.a, p.b) == (pair.a, pair.b)), None))
            for m in report.modules
        ]
        sheet.add(*by_layer(title, "cosine", values, middle=0.0))
        if number == 0:
            shares = [(m.path, _written_over(m)) for m in report.modules]
            sheet.add(*by_layer("Overlap of what they write", "share of the smaller space", shares))
    for i, name in enumerate(names[:_CHARTED]):
        held = [(m.path, m.survival[i]) for m in report.modules]
        sheet.add(*by_layer(f"{name} in the weighted sum", _HELD, held, middle=1.0))


def _written_over(module: ModuleRelations) -> float | None:
    known = [p.output_overlap for p in module.pairs if p.output_overlap is not None]
    return max(known) if known else None


def _intruders(group: list[ModuleRelations], index: int) -> str:
    counts = [m.intruders[index] for m in group if m.intruders]
    known = [c for c in counts if c is not None]
    if not known:
        return "–"
    return str(min(known)) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _matrix(report: CompareReport, names: Sequence[str]) -> SheetTable:
    """Cosines of all pairs, and what the weighted sum holds of each adapter."""
    table = table_of("cos", *names, "in sum", numeric=["cos", *names, "in sum"])
    cosines = {(p.a, p.b): p.cosine for p in report.pairs}
    for i, name in enumerate(names):
        row = ["1" if i == j else _signed(cosines[min(i, j), max(i, j)]) for j in range(len(names))]
        table.add(name, *row, _signed(report.survival[i]))
    return table


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def _span(values: Sequence[float | None]) -> str:
    known = sorted({round(v, 2) + 0.0 for v in values if v is not None})
    if not known:
        return "–"
    if len(known) == 1:
        return _signed(known[0])
    return _signed(known[0]) + (" to " if known[0] < 0 else "–") + _signed(known[-1])


def _percents(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = f"{100 * min(known):.0f}", f"{100 * max(known):.0f}"
    return f"{low}%" if low == high else f"{low}–{high}%"


def _say_verdicts(sheet: Sheet, report: CompareReport, names: Sequence[str]) -> None:
    """A sentence per pair; of many pairs only those that have something to say."""
    told = [
        pair
        for pair in zip(report.pairs, report.verdicts, strict=True)
        if len(names) < _MANY or pair[1] not in ("unrelated", "disjoint")
    ]
    for number, (pair, verdict) in enumerate(told):
        sheet.say(*_sentence(report, pair, verdict, names), apart=number == 0)
    if len(told) < len(report.pairs):
        silent, count = len(report.pairs) - len(told), len(report.pairs)
        sheet.say(f"{silent} of {count} pairs have little to do with each other.", apart=not told)


def _sentence(
    report: CompareReport, pair: Relation, verdict: str, names: Sequence[str]
) -> tuple[str | Toned, ...]:
    a, b = names[pair.a], names[pair.b]
    apart = percent(pair.distance)
    if verdict == "same":
        return Toned(f"{a} and {b} are the same", "good"), f": they differ by {apart}."
    if verdict == "same-deltas":
        return strong(f"{a} and {b} change their modules alike"), ", but differ beside them."
    if verdict == "scaled":
        return strong(f"{b} is {pair.factor or 0:.4g} · {a}"), "."
    if verdict == "near":
        return strong(f"{a} and {b} are nearly the same"), f": they differ by {apart}."
    idle = [name for name, i in ((a, pair.a), (b, pair.b)) if not report.norms[i]]
    if verdict == "disjoint" and idle:
        return strong(f"{idle[0]} does nothing"), ": in every module A or B is zero."
    if verdict == "disjoint":
        return strong(f"{a} and {b} change no module together"), "."
    words = {
        "related": strong(f"{a} and {b} pull the same way"),
        "unrelated": strong(f"{a} and {b} have little to do with each other"),
        "conflict": Toned(f"{a} and {b} pull against each other", "bad"),
    }
    both = sum(bool(m.norms[pair.a] and m.norms[pair.b]) for m in report.modules)
    where = "" if both == len(report.modules) else f" in the {counted(both, 'module')} they share"
    said = [f"cosine {pair.cosine or 0:.3f}{where}"]
    for what, overlap, chance in (
        ("write", pair.output_overlap, pair.output_chance),
        ("read", pair.input_overlap, pair.input_chance),
    ):
        if overlap is not None and chance is not None:
            said.append(f"{what} overlap {100 * overlap:.0f}%, by chance {100 * chance:.0f}%")
    return words[verdict], f" ({'; '.join(said)})."


def _sum_sentence(report: CompareReport, names: Sequence[str]) -> str:
    assert report.sum_share is not None
    if report.sum_share < 1e-9:
        return "The weighted sum is nothing: its parts cancel."
    parts = ", ".join(
        f"{100 * share:.0f}% of " + (name if weight == 1 else f"{weight_text(weight)}·{name}")
        for name, weight, share in zip(names, report.weights, report.survival, strict=True)
        if share is not None
    )
    energy = percent(report.sum_share)
    return f"Along its parts, the weighted sum holds {parts}; it has {energy} of their energy."
