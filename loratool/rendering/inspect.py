"""What `inspect` found, as a sheet."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from loratool.rendering.charts import by_layer, spectra
from loratool.rendering.saying import spectrum_table
from loratool.serving.programs import serving_line
from loratool.sheet import (
    Facts,
    Piece,
    Sheet,
    SheetTable,
    Tone,
    Toned,
    Words,
    folded_lines,
    table_of,
)
from loratool.verbs.inspect import InspectReport
from loratool.verbs.measuring import ModuleReport
from loratool.words import counted, format_bytes, number_text, shape_text, span_text


def inspect_sheet(
    report: InspectReport, full: bool = False, tensors: bool = False, spectrum: bool = False
) -> Sheet:
    sheet = Sheet("inspect", subject=report.source)
    sheet.add(_facts(report))
    if report.modules:
        whole = full or len(report.modules) == 1
        sheet.add(_module_table(report.modules, whole, report.measured))
    if spectrum and report.modules:
        values = [(m.path, m.singular_values or []) for m in report.modules]
        sheet.add(spectrum_table(values, "singular values of ΔW"))
    if report.base is not None:
        sheet.add(*_base(report))
    if tensors or (not (report.is_read or report.format == "empty") and len(report.tensors) <= 8):
        table = table_of("tensor", "dtype", "shape")
        for info in report.tensors:
            table.add(info.name, info.dtype, shape_text(info.shape))
        sheet.add(table)
    if report.audit is not None:
        from loratool.rendering.audit import audit_pieces

        sheet.add(*audit_pieces(report.audit))
    modules = report.modules
    curves = [(m.path, m.singular_values or []) for m in modules]
    sheet.add(
        *by_layer("‖ΔW‖", "Frobenius norm", [(m.path, m.delta_norm) for m in modules]),
        *by_layer("‖ΔW‖/‖W‖", "of ‖W‖", [(m.path, m.relative_norm) for m in modules]),
        *by_layer("Stable rank", "‖ΔW‖²/σ₁²", [(m.path, m.stable_rank) for m in modules]),
        *spectra("Singular values of ΔW", "σ", curves),
    )
    sheet.notices = report.warnings
    return sheet


def _facts(report: InspectReport) -> Facts:
    facts = Facts()
    facts.add("file", report.file)
    facts.add("format", report.description)
    if report.producer:
        facts.add("made by", report.producer)
    if report.peft_type and report.format == "peft":
        facts.add("PEFT type", report.peft_type)
    if report.base_model:
        facts.add("base model", report.base_model)
    if report.is_read:
        _lora_facts(facts, report)
    dtypes = ", ".join(f"{n}× {d}" for d, n in report.dtypes.items())
    facts.add("tensors", f"{len(report.tensors)}" + (f" ({dtypes})" if dtypes else ""))
    size = f"{counted(report.parameters, 'parameter')}, {format_bytes(report.nbytes)}"
    facts.add("size", size)
    if report.is_read:
        _conversions(facts, report)
    if not report.measured:
        facts.add("norms", f"--norms downloads {format_bytes(report.nbytes)} for them")
    for key, value in list(report.metadata.items())[:5]:
        shown = value if len(value) <= 60 else value[:57] + "…"
        facts.add("metadata", f"{key} = {shown}")
    if len(report.metadata) > 5:
        facts.add("", f"and {len(report.metadata) - 5} more entries (--json shows all)")
    if report.serving:
        facts.add("serving", f"{serving_line(report.serving)} (loratool lint)")
    return facts


def _lora_facts(facts: Facts, report: InspectReport) -> None:
    for what, value in report.settings:
        facts.add(what, value)
    ranks = sorted({m.rank for m in report.modules})
    scales = sorted({m.scale for m in report.modules if m.scale is not None})
    if ranks:
        found = f"rank {_values(ranks)}, scale {_values(scales) or 'unknown'}"
        origins = sorted({m.scale_from for m in report.modules if m.scale_from})
        if origins and origins != ["config"]:
            found += f" (from {', '.join(origins)})"
        facts.add("found", found)
    chosen = len(report.modules) + len(report.functions)
    shown = "" if chosen == report.total_modules else f" ({chosen} shown)"
    stacks = sum((m.experts or 1) > 1 for m in report.modules)
    experts = f", {counted(stacks, 'stack')} of experts" if stacks else ""
    facts.add("modules", f"{report.total_modules}{experts}{shown}")
    if report.functions:
        kinds = Counter(report.functions.values())
        facts.add(
            "no sums",
            ", ".join(f"{n} × {kind}" for kind, n in kinds.items())
            + ": they merge, and nothing else",
        )
    if report.saved:
        names = [f"{name} {shape_text(shape)}" for name, shape in report.saved.items()]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        facts.add("saved whole", ", ".join(names[:4]) + more)


def _conversions(facts: Facts, report: InspectReport) -> None:
    """What it could become: targets by outcome, and one line for each that it could not."""
    by_outcome: dict[str, list[str]] = {}
    for target, outcome in report.conversions.items():
        by_outcome.setdefault(outcome, []).append(target)
    can = [f"{', '.join(names)} ({outcome})" for outcome, names in by_outcome.items()
           if not outcome.startswith("no: ")]  # fmt: skip
    if can:
        facts.add("converts to", "; ".join(can))
    for outcome, names in by_outcome.items():
        if outcome.startswith("no: "):
            why = outcome.removeprefix("no: ").splitlines()[0]
            shown = why if len(why) <= 100 else why[:97] + "…"
            facts.add(f"not {', '.join(names)}", shown)


def _values(numbers: Sequence[float]) -> str:
    if len(numbers) > 4:
        return f"{numbers[0]:g}–{numbers[-1]:g}"
    return ", ".join(f"{n:g}" for n in numbers)


def _module_table(modules: list[ModuleReport], full: bool, measured: bool) -> SheetTable:
    """One line per group of modules that differ only in their numbers, under their layers."""
    relative = any(m.relative_norm is not None for m in modules)
    headings = [
        tuple(h for h in (*columns, *(["‖ΔW‖/‖W‖"] if relative else []))
              if measured or h not in _MEASURED)
        for columns in _COLUMNS
    ]  # fmt: skip
    lines = folded_lines(
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
    return SheetTable(tuple(headings), lines, ("s.rank", "out×in", "scale", "σ₁ max"))


#: Columns for wide places and for others.
_COLUMNS = (
    ("module", "kind", "r", "alpha", "scale", "A", "B", "dtype", "‖ΔW‖", "σ₁", "stable rank"),
    ("module", "r/α", "scale", "out×in", "‖ΔW‖", "σ₁ max", "s.rank"),
)

#: Columns that take the values of an adapter, not only its headers.
_MEASURED = ("‖ΔW‖", "σ₁", "σ₁ max", "stable rank", "s.rank")


def _module_cells(group: list[ModuleReport]) -> dict[str, Words]:
    one = group[0]
    named = "" if one.algorithm == "LoRA" else one.algorithm
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
        "dtype": one.dtype,
        "‖ΔW‖": span_text([n for m in group for n in m.expert_norms or (m.delta_norm,)]),
        "σ₁": span_text([m.spectral_norm for m in group]),
        "σ₁ max": number_text(max(largest) if largest else None),
        "stable rank": span_text([m.stable_rank for m in group]),
        "s.rank": number_text(statistics.median(stable) if stable else None, 2),
        "‖ΔW‖/‖W‖": span_text([m.relative_norm for m in group]),
    }  # fmt: skip


def _base(report: InspectReport) -> list[Piece]:
    base = report.base
    assert base is not None
    facts = Facts()
    facts.add("base", f"{base.source} ({base.model_type or 'no config'}, "
              f"{counted(base.parameters, 'parameter')})")  # fmt: skip
    if base.quantised:
        count, adapted = counted(base.quantised_weights, "weight"), base.quantised_adapted
        facts.add("quantised", f"{base.quantised}, {count}, {adapted} of them adapted")
    facts.add("share", f"{base.trainable_share:.3%} of the base's parameters")
    if report.measured and not base.measured:
        facts.add("‖ΔW‖/‖W‖", "--norms downloads the adapted weights for it")
    if base.unmatched:
        unfit = f"{counted(len(base.unmatched), 'part', 'does')} not fit this base"
        facts.add("unmatched", Toned(unfit, "bad"))
    table = table_of("base weight", "adapted", "of")
    for entry in base.coverage:
        tone: Tone = "plain" if entry.adapted else "dim"
        table.add(entry.name, str(entry.adapted), str(entry.total), tone=tone)
    return [facts, table]
