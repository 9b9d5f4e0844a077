"""The sizes of a decoder as Llama's family has it, by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.models.config import layer_count
from loratool.models.heads import Heads, heads_of
from loratool.storage.fields import is_count

#: The linear layers of a layer, in the order in which programs list them.
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """`hidden` and `inner` are the widths of the stream and of the MLP."""

    layers: int
    heads: Heads
    hidden: int
    inner: int
    vocabulary: int

    def shape_of(self, module: str) -> tuple[int, int]:
        """`(out, in)` of the weight of one of `LINEAR`, or of "lm_head"."""
        q, k, v = self.heads.rows
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (k, self.hidden),
            "self_attn.v_proj": (v, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
            "lm_head": (self.vocabulary, self.hidden),
        }[module]


def decoder_of(config: Mapping[str, Any]) -> Decoder | None:
    """None where config.json does not say all of it."""
    sizes = [config.get(key) for key in ("hidden_size", "intermediate_size", "vocab_size")]
    layers, heads = layer_count(dict(config)), heads_of(config)
    if layers is None or heads is None or not all(is_count(size) and size for size in sizes):
        return None
    hidden, inner, vocabulary = (int(size) for size in sizes if size is not None)
    return Decoder(layers, heads, hidden, inner, vocabulary)
