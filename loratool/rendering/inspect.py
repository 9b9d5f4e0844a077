"""Show what `inspect` found."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from loratool.rendering.terminal import (
    NARROW,
    WIDE,
    fact_grid,
    folded_table,
    make_table,
    out,
    spectrum_table,
    verbatim,
)
from loratool.verbs.inspect import InspectReport, ModuleReport
from loratool.words import counted, format_bytes, number_text, shape_text, span_text


def show_inspect(report: InspectReport, full: bool, tensors: bool, spectrum: bool) -> None:
    facts = fact_grid()
    facts.add_row("file", verbatim(report.file))
    facts.add_row("format", verbatim(report.description))
    if report.producer:
        facts.add_row("made by", verbatim(report.producer))
    if report.peft_type and report.format == "peft":
        facts.add_row("PEFT type", verbatim(report.peft_type))
    if report.base_model:
        facts.add_row("base model", verbatim(report.base_model))
    if report.is_read:
        _lora_facts(facts, report)
    dtypes = ", ".join(f"{n}× {verbatim(d)}" for d, n in report.dtypes.items())
    facts.add_row("tensors", f"{len(report.tensors)}" + (f" ({dtypes})" if dtypes else ""))
    size = f"{counted(report.parameters, 'parameter')}, {format_bytes(report.nbytes)}"
    facts.add_row("size", size)
    if report.is_read:
        _conversions(facts, report)
    if not report.measured:
        facts.add_row("norms", f"--norms downloads {format_bytes(report.nbytes)} for them")
    for key, value in list(report.metadata.items())[:5]:
        shown = value if len(value) <= 60 else value[:57] + "…"
        facts.add_row("metadata", verbatim(f"{key} = {shown}"))
    if len(report.metadata) > 5:
        facts.add_row("", f"and {len(report.metadata) - 5} more entries (--json shows all)")
    out.print(facts)
    if report.modules:
        out.print()
        whole = full or len(report.modules) == 1
        out.print(_module_table(report.modules, whole, report.measured))
    if spectrum and report.modules:
        out.print()
        spectra = [(m.path, m.singular_values or []) for m in report.modules]
        out.print(spectrum_table(spectra, "singular values of ΔW"))
    if report.base is not None:
        _show_base(report)
    if tensors or (not (report.is_read or report.format == "empty") and len(report.tensors) <= 8):
        table = make_table("tensor", "dtype", "shape")
        for info in report.tensors:
            table.add_row(verbatim(info.name), verbatim(info.dtype), shape_text(info.shape))
        out.print()
        out.print(table)


def _lora_facts(facts: Table, report: InspectReport) -> None:
    for what, value in report.settings:
        facts.add_row(what, verbatim(value))
    ranks = sorted({m.rank for m in report.modules})
    scales = sorted({m.scale for m in report.modules if m.scale is not None})
    if ranks:
        found = f"rank {_values(ranks)}, scale {_values(scales) or 'unknown'}"
        origins = sorted({m.scale_from for m in report.modules if m.scale_from})
        if origins and origins != ["config"]:
            found += f" (from {', '.join(origins)})"
        facts.add_row("found", found)
    chosen = len(report.modules) + len(report.functions)
    shown = "" if chosen == report.total_modules else f" ({chosen} shown)"
    stacks = sum((m.experts or 1) > 1 for m in report.modules)
    experts = f", {counted(stacks, 'stack')} of experts" if stacks else ""
    facts.add_row("modules", f"{report.total_modules}{experts}{shown}")
    if report.functions:
        kinds = Counter(report.functions.values())
        facts.add_row(
            "no sums",
            ", ".join(f"{n} × {verbatim(kind)}" for kind, n in kinds.items())
            + ": they merge, and nothing else",
        )
    if report.saved:
        names = [f"{name} {shape_text(shape)}" for name, shape in report.saved.items()]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        facts.add_row("saved whole", ", ".join(map(verbatim, names[:4])) + more)


def _conversions(facts: Table, report: InspectReport) -> None:
    """What it could become: targets by outcome, and one line for each that it could not."""
    by_outcome: dict[str, list[str]] = {}
    for target, outcome in report.conversions.items():
        by_outcome.setdefault(outcome, []).append(target)
    can = [f"{', '.join(names)} ({outcome})" for outcome, names in by_outcome.items()
           if not outcome.startswith("no: ")]  # fmt: skip
    if can:
        facts.add_row("converts to", "; ".join(can))
    for outcome, names in by_outcome.items():
        if outcome.startswith("no: "):
            why = outcome.removeprefix("no: ").splitlines()[0]
            shown = why if len(why) <= 100 else why[:97] + "…"
            facts.add_row(f"not {', '.join(names)}", verbatim(shown))


def _values(numbers: Sequence[float]) -> str:
    if len(numbers) > 4:
        return f"{numbers[0]:g}–{numbers[-1]:g}"
    return ", ".join(f"{n:g}" for n in numbers)


def _module_table(modules: list[ModuleReport], full: bool, measured: bool) -> Table:
    """One line per group of modules that differ only in their numbers, under their layers."""
    wide = out.width >= WIDE
    relative = any(m.relative_norm is not None for m in modules)
    headings = ["module", "kind", "r", "alpha", "scale", "A", "B", "dtype", "‖ΔW‖", "σ₁",
                "stable rank"] if wide else [
                "module", "r/α", "scale", "out×in", "‖ΔW‖", "σ₁ max", "s.rank"]  # fmt: skip
    if out.width < NARROW:
        headings = ["module", "r/α", "‖ΔW‖"]
    if not measured:
        headings = [h for h in headings if h not in _MEASURED]
    if relative:
        headings.append("‖ΔW‖/‖W‖")
    return folded_table(
        headings,
        modules,
        lambda m: m.path,
        lambda m: (
            m.kind,
            m.experts,
            m.rank,
            m.alpha,
            m.scale,
            str(m.shapes),
            m.dtype,
            m.algorithm,
        ),
        _module_cells,
        full,
    )


#: Columns that take the values of an adapter, not only its headers.
_MEASURED = ("‖ΔW‖", "σ₁", "σ₁ max", "stable rank", "s.rank")


def _module_cells(group: list[ModuleReport]) -> dict[str, str]:
    one = group[0]
    named = "" if one.algorithm == "LoRA" else verbatim(one.algorithm)
    stable = [m.stable_rank for m in group if m.stable_rank is not None]
    largest = [m.spectral_norm for m in group if m.spectral_norm is not None]
    return {
        "kind": counted(one.experts, "expert") if one.experts and one.experts > 1 else one.kind,
        "r": f"{one.rank} {named}".rstrip(),
        "alpha": "?" if one.alpha is None else f"{one.alpha:g}",
        "r/α": f"{named} {one.rank}/".lstrip()
        + ("?" if one.alpha is None else f"{one.alpha:g}"),
        "scale": "?" if one.scale is None else f"{one.scale:.4g}",
        "A": shape_text(one.shapes.get("A", ())),
        "B": shape_text(one.shapes.get("B", ())),
        "out×in": (f"{one.experts} × " if one.experts and one.experts > 1 else "")
        + (shape_text(one.shape) if all(one.shapes.values()) else "–"),
        "dtype": verbatim(one.dtype),
        "‖ΔW‖": span_text([n for m in group for n in m.expert_norms or (m.delta_norm,)]),
        "σ₁": span_text([m.spectral_norm for m in group]),
        "σ₁ max": number_text(max(largest) if largest else None),
        "stable rank": span_text([m.stable_rank for m in group]),
        "s.rank": number_text(statistics.median(stable) if stable else None, 2),
        "‖ΔW‖/‖W‖": span_text([m.relative_norm for m in group]),
    }  # fmt: skip


def _show_base(report: InspectReport) -> None:
    base = report.base
    assert base is not None
    facts = fact_grid()
    facts.add_row("base", f"{verbatim(base.source)} ({verbatim(base.model_type or 'no config')}, "
                  f"{counted(base.parameters, 'parameter')})")  # fmt: skip
    if base.quantised:
        count, adapted = counted(base.quantised_weights, "weight"), base.quantised_adapted
        facts.add_row(
            "quantised", f"{verbatim(base.quantised)}, {count}, {adapted} of them adapted"
        )
    facts.add_row("share", f"{base.trainable_share:.3%} of the base's parameters")
    if report.measured and not base.measured:
        facts.add_row("‖ΔW‖/‖W‖", "--norms downloads the adapted weights for it")
    if base.unmatched:
        facts.add_row(
            "unmatched", f"[red]{counted(len(base.unmatched), 'part', 'does')} not fit this base[/]"
        )
    out.print()
    out.print(facts)
    table = make_table("base weight", "adapted", "of")
    for entry in base.coverage:
        style = "dim" if not entry.adapted else ""
        table.add_row(verbatim(entry.name), str(entry.adapted), str(entry.total), style=style)
    out.print(table)
