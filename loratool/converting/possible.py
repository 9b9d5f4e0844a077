"""What an adapter could be converted to, told from headers alone."""

from __future__ import annotations

from collections import Counter

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects import TARGETS
from loratool.adapters.dialects.writing import Asked
from loratool.errors import LoraToolError
from loratool.models.checkpoint import Checkpoint

#: Modules of an adapter that this is worth the time for.
_MOST = 4000

#: Outcomes of a draft, worst first: the whole is called by the worst of its parts.
_WORST_FIRST = ("refused", "cut", "rounded", "expanded", "exact")


def possible_targets(adapter: Adapter, base: Checkpoint | None) -> dict[str, str]:
    """What each target would make of an adapter: "exact", "rounded", "expanded", "with --base"
    if that must be known first, or in words why not.

    Empty for an adapter that cannot be used, that has what no target can hold, or that has too many
    modules to ask.
    """
    if not adapter.is_read or adapter.functions or len(adapter.modules) > _MOST:
        return {}
    if any(notice.refused for notice in adapter.notices):
        return {}
    found = {}
    for name, target in TARGETS.items():
        if name == adapter.format and adapter.is_plain:
            continue
        if target.needs_base and base is None:
            found[name] = "with --base"
            continue
        try:
            draft = target.draft(adapter, Asked(base))
        except LoraToolError as error:
            found[name] = f"no: {error.message}"
            continue
        outcomes: Counter[str] = Counter(fate.outcome for fate in draft.fates)
        worst = next((outcome for outcome in _WORST_FIRST if outcomes[outcome]), "exact")
        if worst == "refused":
            first = next(fate for fate in draft.fates if fate.outcome == "refused")
            more = f" and {outcomes[worst] - 1} more" if outcomes[worst] > 1 else ""
            found[name] = f"no: {first.what}{more}: {first.detail}"
        else:
            found[name] = worst
    return found
