"""Show what `compare` found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loratool.combining.relations import ModuleRelations, Relation
from loratool.rendering.terminal import (
    WIDE,
    fact_grid,
    folded_table,
    make_table,
    out,
    print_sentence,
    verbatim,
)
from loratool.verbs.compare import CompareReport, letter
from loratool.words import counted, number_text, percent, span_text

_SHOWN = 5

#: From this many adapters on, pairs that have nothing to do with each other are only counted.
_MANY = 4


def show_compare(report: CompareReport, full: bool, equal: bool) -> None:
    names = [letter(i) for i in range(len(report.adapters))]
    facts = fact_grid()
    for name, adapter, weight, norm in zip(
        names, report.adapters, report.weights, report.norms, strict=True
    ):
        factor = f"  × {weight:g}" if weight != 1 else ""
        facts.add_row(name, f"{verbatim(adapter)}{factor}, ‖Δ‖ {number_text(norm)}")
    if report.base is not None:
        facts.add_row("base", verbatim(report.base))
    out.print(facts)
    out.print()
    out.print(_module_table(report, names, full))
    if report.base is not None:
        print_sentence("\nintruders: of the ten largest singular vectors those the base lacks")
    if len(names) > 2:
        out.print()
        out.print(_matrix(report, names))
    out.print()
    _show_verdicts(report, names)
    print_sentence(_sum_sentence(report, names))
    lines = report.differing if equal else report.differing_beside
    if lines:
        out.print("\nBeside the factors:" if not equal else "\nDifferent:")
        for line in lines[:_SHOWN]:
            print_sentence("  - " + verbatim(line))
        if len(lines) > _SHOWN:
            out.print(f"  … and {len(lines) - _SHOWN} more (--json lists all)")
    if equal:
        word = "[bold green]equal" if report.equal else "[bold red]not equal"
        out.print(f"{word}[/] within {report.tolerance:g}")


def _module_table(report: CompareReport, names: Sequence[str], full: bool) -> Table:
    count = len(names)
    held = [f"{name} in sum" for name in names]
    cosine = "cos" if count == 2 else "cos of pairs"
    both = ["‖A‖", "‖B‖", "‖B‖/‖A‖", "writes", "reads"] if count == 2 else []
    intruders = "intruders " + "/".join(names)
    headings = ["module", cosine, *both, *held]
    if out.width < WIDE and both:
        headings = [h for h in headings if h not in ("‖A‖", "‖B‖")]
    if report.base is not None:
        headings.append(intruders)

    def cells(group: list[ModuleRelations]) -> dict[str, str]:
        pairs = [p for m in group for p in m.pairs]
        line = {
            cosine: _span([p.cosine for p in pairs]),
            "‖A‖": span_text([m.norms[0] for m in group]),
            "‖B‖": span_text([m.norms[1] for m in group]),
            "‖B‖/‖A‖": span_text([p.ratio for p in pairs]),
            "writes": _percents([p.output_overlap for p in pairs]),
            "reads": _percents([p.input_overlap for p in pairs]),
            intruders: " / ".join(_intruders(group, i) for i in range(count)),
        }
        return line | {h: _span([m.survival[i] for m in group]) for i, h in enumerate(held)}

    return folded_table(
        headings, report.modules, lambda m: m.path,
        lambda m: (m.kind, tuple(r is None for r in m.ranks)), cells,
        full or len(report.modules) == 1,
        spare=("‖B‖/‖A‖", *reversed(held), "reads", "writes", cosine),
    )  # fmt: skip


def _intruders(group: list[ModuleRelations], index: int) -> str:
    counts = [m.intruders[index] for m in group if m.intruders]
    known = [c for c in counts if c is not None]
    if not known:
        return "–"
    return str(min(known)) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _matrix(report: CompareReport, names: Sequence[str]) -> Table:
    """Cosines of all pairs, and what the weighted sum holds of each adapter."""
    table = make_table("cos", *names, "in sum")
    cosines = {(p.a, p.b): p.cosine for p in report.pairs}
    for i, name in enumerate(names):
        row = ["1" if i == j else _signed(cosines[min(i, j), max(i, j)]) for j in range(len(names))]
        table.add_row(name, *row, _signed(report.survival[i]))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
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


def _show_verdicts(report: CompareReport, names: Sequence[str]) -> None:
    """A sentence per pair; of many pairs only those that have something to say."""
    silent = 0
    for pair, verdict in zip(report.pairs, report.verdicts, strict=True):
        if len(names) >= _MANY and verdict in ("unrelated", "disjoint"):
            silent += 1
            continue
        print_sentence(_sentence(report, pair, verdict, names))
    if silent:
        out.print(f"{silent} of {len(report.pairs)} pairs have little to do with each other.")


def _sentence(report: CompareReport, pair: Relation, verdict: str, names: Sequence[str]) -> str:
    a, b = names[pair.a], names[pair.b]
    apart = percent(pair.distance)
    if verdict == "same":
        return f"[bold green]{a} and {b} are the same[/]: they differ by {apart}."
    if verdict == "same-deltas":
        return f"[bold]{a} and {b} change their modules alike[/], but differ beside them."
    if verdict == "scaled":
        return f"[bold]{b} is {pair.factor or 0:.4g} · {a}[/]."
    if verdict == "near":
        return f"[bold]{a} and {b} are nearly the same[/]: they differ by {apart}."
    idle = [name for name, i in ((a, pair.a), (b, pair.b)) if not report.norms[i]]
    if verdict == "disjoint" and idle:
        return f"[bold]{idle[0]} does nothing[/]: in every module A or B is zero."
    if verdict == "disjoint":
        return f"[bold]{a} and {b} change no module together[/]."
    words = {
        "related": f"[bold]{a} and {b} pull the same way[/]",
        "unrelated": f"[bold]{a} and {b} have little to do with each other[/]",
        "conflict": f"[bold red]{a} and {b} pull against each other[/]",
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
    return f"{words[verdict]} ({'; '.join(said)})."


def _sum_sentence(report: CompareReport, names: Sequence[str]) -> str:
    if report.sum_share is None:
        return ""
    if report.sum_share < 1e-9:
        return "The weighted sum is nothing: its parts cancel."
    parts = ", ".join(
        f"{100 * share:.0f}% of " + (name if weight == 1 else f"{weight:g}·{name}")
        for name, weight, share in zip(names, report.weights, report.survival, strict=True)
        if share is not None
    )
    energy = percent(report.sum_share)
    return f"Along its parts, the weighted sum holds {parts}; it has {energy} of their energy."
