"""Show what `verify` found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loratool.merging.proof.findings import Finding
from loratool.paths import pattern, ranged, split
from loratool.rendering.terminal import fact_grid, make_table, out, verbatim, verbatim_message
from loratool.verbs.verify import VerifyReport
from loratool.words import counted, format_bytes, number_text, percent

#: Below this width only module, finding and weight are shown.
NARROW = 78

#: From this width on the table shows how far values are off, too.
WIDE = 100


def show_verify(report: VerifyReport, full: bool) -> None:
    facts = fact_grid()
    facts.add_row("merged", verbatim(report.merged))
    facts.add_row("base", verbatim(report.base))
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add_row("adapter", verbatim(adapter) + (f"  × {weight:g}" if weight != 1 else ""))
    if report.findings:
        equal = f"{percent(report.equal)} of the adapted weights have the once-rounded value"
        facts.add_row("equal", equal)
        facts.add_row("untouched", f"{counted(report.untouched, 'tensor')} as in the base")
    if report.lost is not None:
        facts.add_row("rounding", f"took {percent(report.lost)} of the delta")
    if report.bytes_read:
        rate = ""
        if report.bytes_read > 100e6:
            rate = f", {format_bytes(report.bytes_read / max(report.seconds, 1e-9))}/s"
        facts.add_row("read", f"{format_bytes(report.bytes_read)}, {report.seconds:.1f} s{rate}")
    out.print(facts)
    shown = [f for f in report.findings if f.adapted]
    if shown:
        out.print()
        out.print(_table(shown, full or len(shown) == 1))
    out.print()
    for sentence in report.summary:
        plain = sentence.partition(" ")[0].isalpha()  # a path keeps its first letter
        said = sentence[0].upper() + sentence[1:] if plain else sentence
        out.print(verbatim_message(said + "."))
    if report.verdict == "yes":
        out.print("[bold green]yes:[/] the merged model is base + adapters")
    else:
        out.print("[bold red]no:[/] the merged model is not base + adapters")


def _table(findings: Sequence[Finding], full: bool) -> Table:
    """One line per group of tensors with one finding, under their layers."""
    headings = ["module", "finding", "weight"]
    if out.width >= NARROW:
        headings += ["equal", "lost", "unexplained"]
    if out.width >= WIDE:
        headings += ["values off", "max ulp", "max dev."]
    table = make_table(*headings)
    groups: dict[tuple[str, ...], list[Finding]] = {}
    layers: dict[str, list[str]] = {}
    for f in findings:
        key = (f.module,) if full else (pattern(f.module), f.code)
        groups.setdefault(key, []).append(f)
        head = split(f.module)[0]
        layers.setdefault(pattern(head), []).append(head)
    section = ""
    for group in groups.values():
        head, leaf = split(ranged([f.module for f in group]))
        everywhere = head if full else ranged(layers[pattern(split(group[0].module)[0])])
        if everywhere != section and head:
            table.add_row(f"[cyan]{verbatim(everywhere)}[/]")
        section = everywhere
        if head != everywhere:  # only some of the layers
            leaf += " " + head.rpartition(".")[2]
        cells = {
            "module": ("  " if head else "") + verbatim(leaf),
            "finding": group[0].code if group[0].sound else f"[red]{group[0].code}[/]",
            "weight": _weights([f.applied for f in group]),
            "equal": percent(min(f.equal for f in group)),
            "lost": _percents([f.lost for f in group]),
            "unexplained": _percents([f.unexplained for f in group]),
            "values off": f"{sum(f.off for f in group):,}",
            "max ulp": f"{max(f.largest_ulp for f in group):,}",
            "max dev.": number_text(max(f.largest for f in group), 2),
        }
        table.add_row(*[cells[heading] for heading in headings])
    return table


def _percents(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return percent(max(known)) if known else "–"


def _weights(values: Sequence[float | None]) -> str:
    rounded = sorted({round(v, 2) + 0.0 for v in values if v is not None})
    shown = [f"{v:.2f}" for v in rounded]
    if len(shown) < 2:
        return "".join(shown) or "–"
    return f"{shown[0]} to {shown[-1]}" if rounded[0] < 0 else f"{shown[0]}–{shown[-1]}"
