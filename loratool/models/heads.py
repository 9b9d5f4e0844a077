"""How many heads the attention of a model has: what the order of rows of q and k depends on.

Programs disagree on how the two halves of a rotary pair lie. In Hugging Face's files the rows of a
head are its first halves, then its second ones; Meta's code, torchtune and llama.cpp have the two
of each pair side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from loratool.storage.composed import rows_reordered
from loratool.storage.fields import is_count
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Heads:
    """Heads of queries, and those of keys and values; `size` are the rows of one."""

    query: int
    kv: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """The rows of the weights of q, k and v."""
        return self.query * self.size, self.kv * self.size, self.kv * self.size


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads by config.json of a model, or of the text part of one; None where it does not say.

    https://github.com/huggingface/transformers: head_dim is hidden_size / num_attention_heads where
    it is absent, num_key_value_heads all of them.
    """
    text = config.get("text_config")
    said = text if isinstance(text, dict) and "num_attention_heads" not in config else config
    query = said.get("num_attention_heads")
    if not _is_positive(query):
        return None
    kv = query if said.get("num_key_value_heads") is None else said["num_key_value_heads"]
    size, hidden = said.get("head_dim"), said.get("hidden_size")
    if size is None and _is_positive(hidden) and hidden % query == 0:
        size = hidden // query
    return Heads(query, kv, size) if _is_positive(kv) and _is_positive(size) else None


def _is_positive(value: Any) -> TypeGuard[int]:
    return is_count(value) and value > 0


def pairs_apart(info: TensorInfo, heads: int) -> TensorInfo:
    """Rows of `heads` heads in the order of Hugging Face, of ones with rotary pairs side by side:
    `[heads, n/2, 2]` -> `[heads, 2, n/2]`."""
    return rows_reordered(info, (heads, info.shape[0] // heads // 2, 2))


def pairs_together(info: TensorInfo, heads: int) -> TensorInfo:
    """The reverse of `pairs_apart`."""
    return rows_reordered(info, (heads, 2, info.shape[0] // heads // 2))
