"""The modules of what a card describes: those of an adapter, or those that went into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.paths import grouped, ranged, ranged_names
from loratool.publishing.cards.facts import CardFacts, dicts, hub_id, number, part, string
from loratool.sheet import Piece, Sentence, SheetTable, code, listed_words, said, table_of
from loratool.words import counted, enumerated, shape_text

#: Lines of a table beyond which a card would be a listing.
_MOST = 50
#: Lists of token rows that are named.
_NAMED = 5


def modules_of(facts: CardFacts) -> list[Piece]:
    if facts.adapter is not None:
        return [*_cut(_adapter_table(facts.adapter)), *_whole(facts.adapter)]
    result = part(facts.record, "result")
    count = number(result.get("modules"))
    if facts.command not in ("merge", "unmerge") or count is None:
        return []
    return [_changed(facts, result, int(count)), *_cut(_input_table(facts))]


def _changed(facts: CardFacts, result: dict[str, Any], count: int) -> Sentence:
    """What became of the tensors of a model."""
    tensors = part(result, "tensors")
    into = "subtracted from" if facts.command == "unmerge" else "merged into"
    changed = int(number(tensors.get("merge")) or 0)
    text = f"{counted(count, 'module')} of the adapters {'was' if count == 1 else 'were'} "
    text += f"{into} {counted(changed, 'tensor')}."
    if changed < count:
        text += " Where several adapters change one tensor, the sum is rounded once."
    words = {"replace": "replaced by an adapter's", "add": "added", "cast": "in another dtype only",
             "copy": "unchanged"}  # fmt: skip
    others = [f"{int(n):,} {words[key]}" for key in words if (n := number(tensors.get(key)))]
    if others:
        text += f" Of the other tensors: {enumerated(others)}."
    changes = list(map(code, part(result, "config_changes")))
    if not changes:
        return said(text)
    return said(text, " In ", code("config.json"), " changed: ", listed_words(changes), ".")


def _input_table(facts: CardFacts) -> SheetTable:
    """The modules of the adapters that went into a model, by its record."""
    entries = dicts(facts.record.get("removed" if facts.command == "unmerge" else "adapters"))
    several = len(entries) > 1
    headings = ["module", "kind", "count", "rank", "alpha", "scale"]
    table = table_of(*["adapter"] * several, *headings)
    for entry in entries:
        name = hub_id(entry.get("repo")) or string(entry.get("name"))
        for group in dicts(entry.get("modules")):
            kind = string(group.get("kind")) + (", DoRA" if group.get("dora") else "")
            numbers = [number(group.get(key)) for key in ("count", "rank", "alpha", "scale")]
            cells = ["unknown" if n is None else f"{n:.4g}" for n in numbers]
            table.add(*[code(name)] * several, code(string(group.get("path"))), kind, *cells)
    return table


def _adapter_table(adapter: Adapter) -> SheetTable:
    """One line for the modules that differ only in the numbers of their path."""
    table = table_of("module", "kind", "count", "out×in", "rank", "alpha", "scale")
    for group in grouped(adapter.modules.items(), lambda item: item[0], lambda m: _sort(m[1])):
        modules = [module for _, module in group]
        kind, shape, dora = _sort(modules[0])
        table.add(
            code(ranged([path for path, _ in group])), f"{kind}, DoRA" if dora else kind,
            f"{len(group):,}", shape_text(shape), span(m.rank for m in modules),
            span(m.alpha for m in modules), span(m.scale for m in modules),
        )  # fmt: skip
    return table


def _sort(module: Factors) -> tuple[str, tuple[int, ...], bool]:
    """What modules of one line have in common: kind, shape, whether they have DoRA."""
    experts = module.experts if isinstance(module, ExpertStack) else 1
    kind = counted(experts, "expert") if experts > 1 else module.kind
    return kind, module.shape, module.magnitude is not None


def _cut(table: SheetTable) -> list[Piece]:
    """As much of a table as is read; nothing of an empty one."""
    if not table.lines:
        return []
    more = len(table.lines) - _MOST
    del table.lines[_MOST:]
    return [table, *[said(f"and {more} more kinds of module.")] * (more > 0)]


def _whole(adapter: Adapter) -> list[Piece]:
    """What the adapter holds beside factors."""
    pieces: list[Piece] = []
    if adapter.replaced:
        names = listed_words(list(map(code, ranged_names(adapter.replaced))))
        pieces.append(said("Saved whole: ", names, "."))
    for path, rows in list(adapter.token_rows.items())[:_NAMED]:
        pieces.append(said("Trained rows of ", code(path), f": {len(rows.indices):,}."))
    return pieces


def span(values: Iterable[float | None]) -> str:
    """ "8" for one value, "5–7" for several."""
    known = sorted({value for value in values if value is not None})
    shown = list(dict.fromkeys(f"{value:.4g}" for value in known))
    return "–".join(shown if len(shown) < 2 else [shown[0], shown[-1]]) or "unknown"
