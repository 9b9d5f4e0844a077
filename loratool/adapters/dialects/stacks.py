"""Experts that a file keeps in one tensor: how many of them are believed."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.errors import AdapterError

#: Experts of all layers together; the largest models have a third of that.
MOST_EXPERTS = 200_000


def check_experts(adapter: Adapter, count: int) -> None:
    """Raise AdapterError for more experts than any model has: each is an object of its own."""
    if count > MOST_EXPERTS:
        raise AdapterError(
            f"{adapter.label}: its tensors would be factors of more than {MOST_EXPERTS:,} experts.",
            "No model has so many: check the file.",
        )
