"""Which rows of a tensor: fractions of them all, or blocks whose sizes differ by the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

#: Parameters in memory whose rows are one after the other in one tensor, or that follow one another
#: in one parameter, and the fields of a config that are the sizes: sums of products.
_BLOCKS: dict[tuple[str, ...], list[list[list[str]]]] = {
    ("q_proj", "k_proj", "v_proj"): [
        [["num_attention_heads"]], [["num_key_value_heads"]], [["num_key_value_heads"]],
    ],
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"): [
        [["linear_num_key_heads", "linear_key_head_dim"]] * 2
        + [["linear_num_value_heads", "linear_value_head_dim"]],
        [["linear_num_value_heads", "linear_value_head_dim"]],
        [["linear_num_value_heads"]],
        [["linear_num_value_heads"]],
    ],
    ("embed_tokens", "embed_tokens"): [[["vocab_size"]], [["additional_vocab_size"]]],
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """A part of rows, as fractions of them all; or the block `index` of `count` blocks one after
    the other, where their sizes are not the same in every model."""

    start: Fraction = Fraction(0)
    stop: Fraction = Fraction(1)
    #: Every second row, from row `offset`.
    step: int = 1
    offset: int = 0
    index: int | None = None
    count: int = 0

    def of(self, rows: int) -> range | None:
        """These of so many rows; None if the number cannot be divided so, or sizes differ."""
        start, stop = self.start * rows, self.stop * rows
        if self.index is not None or start.denominator > 1 or stop.denominator > 1:
            return None
        return range(int(start) + self.offset, int(stop), self.step)

    @classmethod
    def read(cls, value: Sequence[Any]) -> Share:
        """A share from its form in the table."""
        if isinstance(value[0], int):
            return cls(index=value[0], count=value[1])
        return cls(Fraction(value[0]), Fraction(value[1]), *value[2:])


def by_config(
    config: Mapping[str, Any], parts: Sequence[str], attributes: dict[str, Any]
) -> dict[str, Any]:
    """What is said of a segment with this name in memory, with fractions in the place of a block's
    number where the config tells the sizes of all blocks."""
    found = dict(attributes)
    for key in ("rows", "into"):
        value = found.get(key)
        if value and type(value[0]) is int:
            sizes = _sizes(config.get("text_config") or config, parts, *value)
            if sizes:
                ends = [Fraction(sum(sizes[:at]), sum(sizes)) for at in range(len(sizes) + 1)]
                found[key] = [str(end) for end in ends[value[0] : value[0] + 2]]
    return found


def _sizes(
    text: Mapping[str, Any], parts: Sequence[str], block: int, count: int
) -> list[int] | None:
    """The sizes of the blocks, in a unit of their own; None where they are not known."""
    for names, terms in _BLOCKS.items():
        if len(names) == count and names[block] in parts:
            sizes = [
                sum(math.prod(_number(text, field) for field in product) for product in term)
                for term in terms
            ]
            return sizes if min(sizes) > 0 else None
    return None


def _number(text: Mapping[str, Any], field: str) -> int:
    value = text.get(field)
    return value if type(value) is int and value > 0 else 0
