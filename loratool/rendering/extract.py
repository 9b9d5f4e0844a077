"""What `extract` found and made, as a sheet."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.extracting.report import ExtractedModule, ExtractReport, GroupShare, OtherTensor
from loratool.extracting.unasked import OPTIONS
from loratool.paths import ranged_names
from loratool.rendering.charts import by_layer, spectra
from loratool.rendering.ranks import rank_text
from loratool.rendering.saying import is_part, share_facts, sheet_of, spectrum_table
from loratool.sheet import (
    Chart,
    Curves,
    Facts,
    Sheet,
    SheetTable,
    Toned,
    Words,
    folded_lines,
)
from loratool.words import counted, format_bytes, percent, shape_text, span_text


def extract_sheet(report: ExtractReport, full: bool = False, spectrum: bool = False) -> Sheet:
    sheet = sheet_of("extract", report.dry_run)
    sheet.subject = report.tuned
    facts = Facts()
    facts.add("base", _model_text(report.base, report.base_quantised))
    facts.add("tuned", _model_text(report.tuned, report.tuned_quantised))
    sheet.add(facts)
    sheet.notices = report.warnings
    if is_part(report.share):
        share_facts(facts, report.share, report.output)
        return sheet
    _changes(facts, report)
    _figures(facts, report)
    sheet.add(_table(report, full))
    if spectrum and not report.dry_run:
        values = [(m.path, m.singular_values[: m.rank]) for m in report.modules]
        sheet.add(spectrum_table(values, "singular values in the adapter"))
    sheet.add(*_charts(report))
    return sheet


def _changes(facts: Facts, report: ExtractReport) -> None:
    """What of the fine-tune became factors, is saved whole, or is left out."""
    facts.add("modules", _modules_text(report))
    if report.saved:
        facts.add("saved whole", _others_text(report.saved))
    for group in report.groups:
        facts.add(group.group, _group_text(group))
    for label, why in (("left out", "excluded"), ("rounding only", "rounding")):
        left = [tensor for tensor in report.left if tensor.why == why]
        if left:
            facts.add(label, Toned(_left_text(left, report), "warning"))
    if report.unchanged:
        facts.add("unchanged", counted(report.unchanged, "tensor"))


def _figures(facts: Facts, report: ExtractReport) -> None:
    """How much of the fine-tune the adapter holds, and what it takes on the disk."""
    if report.held is not None and report.error is not None:
        best = report.best_error or 0.0
        text = f"{percent(report.held)} of ‖ΔW‖², relative error {percent(report.error)}"
        bound = f" (best possible ≥ {percent(best)})" if best > 1e-4 else ""
        facts.add("holds", text + bound)
    if len(report.held_by_rank) > 1:
        near = [
            (r, share) for r, share in report.held_by_rank.items() if r <= 2 * (report.rank or 0)
        ]
        facts.add("by rank", ", ".join(f"{r}: {percent(share)}" for r, share in near))
    what = "quantising and storing" if report.quantising else "storing TUNED"
    facts.add("noise", f"{percent(report.noise)} of ‖ΔW‖ is what {what} rounded off")
    if report.rounding is not None:
        facts.add("rounding", f"took about {percent(report.rounding)} of the delta")
    if report.verified is not None:
        text = f"base + adapter is {percent(report.verified)} of ‖ΔW‖ off the tuned model"
        facts.add("verified", text)
    if report.dry_run:
        sizes = [f"rank {rank}: {format_bytes(n)}" for rank, n in report.proposals.items()]
        facts.add("sizes", ", ".join(sizes) or "no rank fits the budget")
        facts.add("took", f"{report.seconds:.1f} s")
    else:
        share = report.bytes_written / max(1, report.bytes_tuned)
        size = f"{format_bytes(report.bytes_written)} ({report.dtype})"
        size += f", {percent(share)} of the model"
        facts.add("written", f"{size}; {report.seconds:.1f} s")
        facts.add("output", report.output)


def _charts(report: ExtractReport) -> list[Chart]:
    """Where the fine-tune changed, what the factors miss, and what other ranks would hold."""
    modules = report.modules
    charts = by_layer("‖ΔW‖/‖W‖", "of ‖W‖", [(m.path, m.relative) for m in modules])
    charts += by_layer("Error", "of ‖ΔW‖", [(m.path, m.error) for m in modules])
    if len(report.held_by_rank) > 1:
        ranks = [float(rank) for rank in report.held_by_rank]
        errors = [max(0.0, 1 - share) ** 0.5 for share in report.held_by_rank.values()]
        charts.append(Curves("Error by rank, one rank for all modules", "rank",
                             "relative error", [("all modules", ranks, errors)]))  # fmt: skip
    curves = [(m.path, m.singular_values) for m in modules]
    return charts + spectra("Singular values of ΔW", "σ", curves)


def _model_text(name: str, quantised: str) -> str:
    return name + (f" (quantised: {quantised})" if quantised else "")


def _modules_text(report: ExtractReport) -> str:
    ranks = [m.rank for m in report.modules if m.rank]
    text = str(len(report.modules))
    if not ranks:
        return text
    if len(ranks) < len(report.modules):
        text += f", {len(report.modules) - len(ranks)} without factors"
    return f"{text}, rank {rank_text(ranks)}"


def _others_text(tensors: Sequence[OtherTensor]) -> str:
    names = ranged_names(tensor.name for tensor in tensors)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    total = format_bytes(sum(t.nbytes for t in tensors))
    return f"{counted(len(tensors), 'tensor')}, {total}: {', '.join(names[:4])}{more}"


def _group_text(group: GroupShare) -> str:
    """How much of the change a group is, and what leaving it out costs."""
    size = f"{counted(group.tensors, 'tensor')}, {percent(group.share)} of ‖ΔW‖²"
    if not group.saved:
        size += ", left out" + f" ({OPTIONS[group.group]})" * bool(group.unasked)
    elif group.saved < group.tensors:
        size += f", {group.saved} in the adapter"
    if group.error_without is None:
        return size
    if group.error_with is None:
        return f"{size}; the error is {percent(group.error_without)} without them"
    ends = percent(group.error_with), percent(group.error_without)
    if ends[0] == ends[1]:
        return f"{size}; the error is {ends[0]} with them and without"
    return f"{size}; the error is {ends[0]} with them, {ends[1]} without"


def _left_text(left: Sequence[OtherTensor], report: ExtractReport) -> str:
    """What is left out, the largest changes first."""
    energy = report.norm**2 or 1.0
    shares = sorted(((t.norm or 0.0) ** 2 / energy, t.name) for t in left)[::-1]
    names = [f"{name} {percent(share)}" for share, name in shares[:3]]
    more = f" and {len(shares) - 3} more" if len(shares) > 3 else ""
    total = percent(sum(share for share, _ in shares))
    count = counted(len(shares), "tensor")
    return f"{count}, {total} of ‖ΔW‖²: {', '.join(names)}{more}"


def _table(report: ExtractReport, full: bool) -> SheetTable:
    headings: tuple[str, ...] = (
        "module", "r", "out×in", "‖ΔW‖", "‖ΔW‖/‖W‖", "s.rank", "kept ≥", "error ≤", "noise ≤",
    )  # fmt: skip
    if report.dry_run:
        headings = ("module", "out×in", "‖ΔW‖", "‖ΔW‖/‖W‖", "noise ≤")
    lines = folded_lines(
        report.modules,
        lambda m: m.path,
        lambda m: (m.kind, m.shape),
        _cells,
        full or len(report.modules) == 1,
    )
    return SheetTable((headings,), lines, ("out×in", "s.rank", "‖ΔW‖", "noise ≤", "error ≤"))


def _cells(group: list[ExtractedModule]) -> dict[str, Words]:
    ranks = [m.rank for m in group if m.rank is not None]
    cells: dict[str, Words] = {
        "out×in": shape_text(group[0].shape),
        "‖ΔW‖": span_text([m.norm for m in group]),
        "‖ΔW‖/‖W‖": span_text([m.relative for m in group]),
        "noise ≤": percent(max(m.noise for m in group)),
    }
    if not ranks:
        return cells
    low, high = min(ranks), max(ranks)
    return {
        **cells,
        "r": str(low) if low == high else f"{low}–{high}",
        "s.rank": f"{max(m.stable_rank or 0.0 for m in group):.1f}",
        "kept ≥": percent(min(m.kept or 0 for m in group)),
        "error ≤": percent(max(m.error or 0 for m in group)),
    }
