"""Modules of an adapter before and after: what the tables of combine and resize share."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loratool.combining.rank_change import ModuleChange
from loratool.rendering.terminal import folded_table
from loratool.words import percent, shape_text, span_text


def change_table(headings: Sequence[str], changes: Sequence[ModuleChange], full: bool) -> Table:
    return folded_table(
        headings,
        changes,
        lambda m: m.path,
        lambda m: (m.kind, m.shape, tuple(r is None for r in m.ranks)),
        _cells,
        full or len(changes) == 1,
        spare=("out×in", "‖ΔW‖", "ranks", "error ≤", "off sum ≤", "r"),
    )


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


def _cells(group: list[ModuleChange]) -> dict[str, str]:
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
