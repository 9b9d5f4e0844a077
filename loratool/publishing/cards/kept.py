"""What the adapter of a card kept of what it was made of, and where it lost most."""

from __future__ import annotations

import math
import statistics
from typing import Any

from loratool.paths import ranged_names
from loratool.publishing.cards.facts import CardFacts, dicts, number, part, texts
from loratool.sheet import Piece, Sentence, code, listed_words, said, table_of
from loratool.words import percent

#: Modules that are named.
_WORST = 5
#: What is kept of a module is not distinguished from all of it above this share.
_ALL = 1 - 1e-9


def what_was_kept(facts: CardFacts) -> list[Piece]:
    """By the record of combine, resize or extract; nothing where that does not tell."""
    if facts.command not in ("combine", "resize", "extract"):
        return []
    result = part(facts.record, "result")
    modules = _shares(result)
    if not modules:
        return []
    symbol = "‖tuned − base‖²" if facts.command == "extract" else "‖ΔW‖²"
    text = _overall(facts, result, [kept for _, _, kept in modules], symbol)
    dtype = part(facts.record, "options").get("dtype")
    if dtype in ("float16", "bfloat16"):
        text += f" What rounding the factors to {dtype} adds is not counted."
    return [Sentence(text), *_worst(modules), *_left(result)]


def _worst(modules: list[tuple[str, int, float]]) -> list[Piece]:
    worst = sorted((m for m in modules if m[2] < _ALL), key=lambda m: m[2])[:_WORST]
    if not worst:
        return []
    most = len(modules) > _WORST
    table = table_of("module", "rank", "kept", "relative error")
    for path, rank, kept in worst:
        table.add(code(path), str(rank), percent(kept), percent(math.sqrt(max(0.0, 1 - kept))))
    return [Sentence("The modules that lost most:" if most else "Module by module:"), table]


def _left(result: dict[str, Any]) -> list[Piece]:
    left = texts(result.get("left"))
    if not left:
        return []
    names = listed_words(list(map(code, ranged_names(left))))
    text = f"Changed in the fine-tune and left out of the adapter: {len(left):,}, "
    return [said(text, names, ".")]


def _shares(result: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Path, rank and share kept of every module, as extract and as the others record it."""
    modules = result.get("modules")
    entries: list[tuple[object, dict[str, Any]]] = [
        (entry.get("path"), entry) for entry in dicts(modules)
    ]
    if isinstance(modules, dict):
        entries = [(path, entry) for path, entry in modules.items() if isinstance(entry, dict)]
    found = []
    for path, entry in entries:
        kept, rank = number(entry.get("kept")), number(entry.get("rank"))
        if kept is not None and rank is not None:
            found.append((str(path), int(rank), min(1.0, max(0.0, kept))))
    return found


def _overall(facts: CardFacts, result: dict[str, Any], shares: list[float], symbol: str) -> str:
    extracted = facts.command == "extract"
    held = number(result.get("held" if extracted else "kept"))
    if held is not None:
        held = min(1.0, max(0.0, held))
        error = number(result.get("error"))
        error = math.sqrt(1 - held) if error is None else error
        where = "all tensors" if extracted else "all modules together"
        if held >= _ALL:
            return f"Nothing of {symbol} was cut."
        text = f"Over {where} the adapter keeps {percent(held)} of {symbol}, a relative error of "
        text += f"{percent(error)}."
        verified = number(result.get("verified"))
        if verified is not None:
            text += f" Read back and measured: {percent(verified)}."
        return text
    # Shares of single modules cannot be added up without their norms, which are not recorded.
    low, high = min(shares), max(shares)
    middle = percent(statistics.median(shares))
    if low >= _ALL:
        return f"Nothing of {symbol} was cut in any module."
    return (
        f"Of {symbol} the factors keep {percent(low)} to {percent(high)}, module by module "
        f"(median {middle})."
    )
