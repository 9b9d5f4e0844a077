"""Whether merge takes an adapter: by what its reader found, or by the plan for a base."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.finite import refuse_not_finite
from loratool.errors import LoraToolError
from loratool.merging.identity import refuse_held
from loratool.merging.options import MergeOptions
from loratool.merging.residual_base import plan_on
from loratool.models.checkpoint import Checkpoint
from loratool.serving.verdict import Remark, Served, Verdict
from loratool.version import __version__

#: What merge does when nobody says how.
_AS_USUAL = MergeOptions()


def merge_verdict(adapter: Adapter, base: Checkpoint | None) -> Verdict:
    """What `loratool merge` makes of an adapter: the plan for the base, with all its refusals;
    without a base what the adapter alone tells."""
    remarks = _by_plan(adapter, base) if base is not None else _by_reader(adapter)
    outcome: Served = "refused" if remarks else "loads"
    return Verdict("merge", "loratool merge", __version__, outcome, remarks)


def _by_reader(adapter: Adapter) -> list[Remark]:
    return [
        Remark("refused", notice.code, _first_line(notice.message))
        for notice in adapter.notices
        if notice.refused
    ]


def _by_plan(adapter: Adapter, base: Checkpoint) -> list[Remark]:
    try:
        adapter.fetch()
        plan_on(base, [adapter], [1.0], _AS_USUAL.dtype_for(base)[0])
        refuse_not_finite(adapter)
        refuse_held(base, [adapter])
    except LoraToolError as error:
        said = error.message.replace("\n  ", " ")
        return [Remark("refused", error.code, f"{said} {error.hint}".strip())]
    return []


def _first_line(message: str) -> str:
    return message.replace("\n  - ", " ").replace("\n  ", " ")
