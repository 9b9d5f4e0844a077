"""Show what `compare` found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from loratool.comparing import CompareReport, ModuleComparison, Pair
from loratool.console.common import (
    NARROW,
    WIDE,
    fact_grid,
    folded_table,
    make_table,
    number_text,
    out,
    percent_text,
    span_text,
)

_SHOWN = 5


def show_compare(report: CompareReport, full: bool, equal: bool) -> None:
    names = _letters(len(report.adapters))
    facts = fact_grid()
    for name, adapter, weight, norm in zip(
        names, report.adapters, report.weights, report.norms, strict=True
    ):
        factor = f"  × {weight:g}" if weight != 1 else ""
        facts.add_row(name, f"{escape(adapter)}{factor}, ‖Δ‖ {number_text(norm)}")
    if report.base is not None:
        facts.add_row("base", escape(report.base))
    out.print(facts)
    out.print()
    out.print(_module_table(report, full))
    if len(names) > 2:
        out.print()
        out.print(_matrix(report, names))
    out.print()
    for pair, verdict in zip(report.pairs, report.verdicts, strict=True):
        out.print(_sentence(pair, verdict, names))
    out.print(_sum_sentence(report, names))
    if equal or "same-deltas" in report.verdicts:
        _show_differences(report)
    if equal:
        word = "[bold green]equal" if report.equal else "[bold red]not equal"
        out.print(f"{word}[/] within {report.tolerance:g}")


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(count)]


def _module_table(report: CompareReport, full: bool) -> Table:
    count = len(report.adapters)
    names = _letters(count)
    survives = [f"{name} in sum" for name in names]
    headings = ["module", "cos"]
    intruders = any(m.intruders for m in report.modules)
    if count == 2 and out.width >= WIDE:
        headings += ["‖A‖", "‖B‖"]
    if count == 2 and out.width >= NARROW:
        headings += ["writes", "reads"] if intruders else ["‖B‖/‖A‖", "writes", "reads"]
    if out.width >= (NARROW if count <= (2 if intruders else 4) else WIDE):
        headings += survives
    if intruders:
        headings.append("intruders")

    def cells(group: list[ModuleComparison]) -> dict[str, str]:
        pairs = [p for m in group for p in m.pairs]
        line = {
            "cos": _span([p.cosine for p in pairs]),
            "‖A‖": span_text([m.norms[0] for m in group]),
            "‖B‖": span_text([m.norms[1] for m in group]),
            "‖B‖/‖A‖": span_text([p.ratio for p in pairs]),
            "writes": _percents([p.output_overlap for p in pairs]),
            "reads": _percents([p.input_overlap for p in pairs]),
            "intruders": "  ".join(_intruders(group, i) for i in range(count)),
        }
        return line | {h: _span([m.survival[i] for m in group]) for i, h in enumerate(survives)}

    return folded_table(
        headings, report.modules, lambda m: m.path,
        lambda m: (m.kind, tuple(r is None for r in m.ranks)), cells,
        full or len(report.modules) == 1,
    )  # fmt: skip


def _intruders(group: list[ModuleComparison], index: int) -> str:
    counts = [m.intruders[index] for m in group if m.intruders]
    known = [c for c in counts if c is not None]
    if not known:
        return "–"
    return str(min(known)) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _matrix(report: CompareReport, names: Sequence[str]) -> Table:
    """Cosines of all pairs, and what of each adapter the sum leaves."""
    table = make_table("cos", *names, "in sum")
    cosines = {(p.a, p.b): p.cosine for p in report.pairs}
    for i, name in enumerate(names):
        row = ["1" if i == j else _signed(cosines[min(i, j), max(i, j)]) for j in range(len(names))]
        table.add_row(name, *row, _signed(report.survival[i]))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    return table


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.2f}"


def _span(values: Sequence[float | None]) -> str:
    known = sorted({round(v, 2) + 0.0 for v in values if v is not None})
    if not known:
        return "–"
    shown = f"{known[0]:.2f}"
    if len(known) == 1:
        return shown
    return shown + (" to " if known[0] < 0 else "–") + f"{known[-1]:.2f}"


def _percents(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = f"{100 * min(known):.0f}", f"{100 * max(known):.0f}"
    return f"{low}%" if low == high else f"{low}–{high}%"


def _sentence(pair: Pair, verdict: str, names: Sequence[str]) -> str:
    a, b = names[pair.a], names[pair.b]
    cosine = "" if pair.cosine is None else f"cosine {pair.cosine:.3f}"
    spaces = ""
    if pair.output_overlap is not None and pair.input_overlap is not None:
        spaces = (
            f"; they share {100 * pair.output_overlap:.0f}% of what they write to and "
            f"{100 * pair.input_overlap:.0f}% of what they read from"
        )
    return {
        "same": f"[bold green]{a} and {b} are the same[/]: they differ by "
        f"{percent_text(pair.distance)} at most",
        "same-deltas": f"[bold]{a} and {b} change their modules alike[/], but differ beside them",
        "scaled": f"[bold]{b} is {pair.factor or 0:.4g} · {a}[/]",
        "related": f"[bold]{a} and {b} pull the same way[/] ({cosine}{spaces})",
        "unrelated": f"[bold]{a} and {b} have little to do with each other[/] ({cosine}{spaces})",
        "conflict": f"[bold red]{a} and {b} pull against each other[/] ({cosine}{spaces})",
        "disjoint": f"[bold]{a} and {b} change no module together[/]",
    }[verdict] + "."


def _sum_sentence(report: CompareReport, names: Sequence[str]) -> str:
    if report.sum_share is None:
        return ""
    shares = ", ".join(
        f"{_signed(share)} × {name}" for name, share in zip(names, report.survival, strict=True)
        if share is not None
    )  # fmt: skip
    energy = percent_text(report.sum_share)
    return f"In the weighted sum is {shares}; it has {energy} of the energy of its parts."


def _show_differences(report: CompareReport) -> None:
    out.print()
    for line in report.differing[:_SHOWN]:
        out.print("  - " + escape(line))
    if len(report.differing) > _SHOWN:
        out.print(f"  … and {len(report.differing) - _SHOWN} more")
