"""Where queries, keys and values are in one matrix: the numbers of heads in the config say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.models.layouts.table import Segment

#: The projections in the order of their blocks.
_BLOCKS = ("q_proj", "k_proj", "v_proj")


def projection_rows(config: Mapping[str, Any], segment: Segment, rows: int) -> range | None:
    """The rows of a tensor of `rows` rows that hold the segment's queries, keys or values; None for
    any other segment, and where the numbers of heads do not divide the tensor."""
    into = segment.into
    if into is None or into.index is None or into.count != len(_BLOCKS):
        return None
    if _BLOCKS[into.index] not in segment.memory.split("."):
        return None
    text = config.get("text_config") or config
    queries, others = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if type(queries) is not int or type(others) is not int or min(queries, others) < 1:
        return None
    heads = (queries, others, others)
    size, left = divmod(rows, sum(heads))
    start = sum(heads[: into.index]) * size
    return None if left else range(start, start + heads[into.index] * size)
