"""Modules of an adapter before and after: what the answers of combine and resize share."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.combining.rank_change import ModuleChange
from loratool.rendering.charts import by_layer
from loratool.sheet import Chart, SheetTable, Words, folded_lines
from loratool.words import percent, shape_text, span_text

_SPARE = ("out×in", "‖ΔW‖", "ranks", "error ≤", "off sum ≤", "r")


def change_table(
    headings: Sequence[str], changes: Sequence[ModuleChange], full: bool
) -> SheetTable:
    lines = folded_lines(
        changes,
        lambda m: m.path,
        lambda m: (m.kind, m.shape, tuple(r is None for r in m.ranks)),
        _cells,
        full or len(changes) == 1,
    )
    return SheetTable((tuple(headings),), lines, _SPARE)


def change_charts(changes: Sequence[ModuleChange]) -> list[Chart]:
    """Ranks and errors of all modules, by layer."""
    ranks = by_layer("Rank", "rank", [(m.path, float(m.rank)) for m in changes])
    errors = by_layer("Relative error", "of ‖ΔW‖", [(m.path, m.error) for m in changes])
    norms = by_layer("‖ΔW‖", "Frobenius norm", [(m.path, m.norm) for m in changes])
    return [*norms, *ranks, *(errors if any(m.error for m in changes) else [])]


def cut_text(kept: float | None, error: float) -> str:
    """What a cut left, and the relative error it makes."""
    if kept is None or error < 1e-6:
        return "nothing"
    return f"to {percent(kept)} of ‖ΔW‖², relative error {percent(error)}"


def rank_text(ranks: Sequence[int]) -> str:
    """ "8", or "4–8" with the average where they differ."""
    if min(ranks) == max(ranks):
        return str(ranks[0])
    return f"{min(ranks)}–{max(ranks)} ({sum(ranks) / len(ranks):.1f} on average)"


def _cells(group: list[ModuleChange]) -> dict[str, Words]:
    old = [_ranks(list(ranks)) for ranks in zip(*(m.ranks for m in group), strict=True)]
    kept = [m.kept for m in group if m.kept is not None]
    far = [m.from_sum for m in group if m.from_sum is not None]
    return {
        "ranks": " + ".join(old),
        "r": old[0],
        "new r": _ranks([m.rank for m in group]),
        "out×in": shape_text(group[0].shape),
        "‖ΔW‖": span_text([m.norm for m in group]),
        "kept ≥": percent(min(kept)) if kept else "–",
        "error ≤": percent(max(m.error for m in group)),
        "off sum ≤": percent(max(far)) if far else "–",
    }


def _ranks(ranks: Sequence[int | None]) -> str:
    known = [r for r in ranks if r is not None]
    if not known:
        return "–"
    return str(known[0]) if min(known) == max(known) else f"{min(known)}–{max(known)}"
