"""Which rows of a tensor: fractions of them all, or blocks whose sizes differ by the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

#: The blocks of a matrix of queries, keys and values, in their order.
_BLOCKS = ("q_proj", "k_proj", "v_proj")


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


def by_heads(
    config: Mapping[str, Any], parts: Sequence[str], attributes: dict[str, Any]
) -> dict[str, Any]:
    """What is said of a segment with this name in memory; where it is one block of queries, keys
    and values, with the fractions that the config's numbers of heads give."""
    into = attributes.get("into")
    if not into or type(into[0]) is not int or into[1] != len(_BLOCKS):
        return attributes
    text = config.get("text_config") or config
    queries, others = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if type(queries) is not int or type(others) is not int or min(queries, others) < 1:
        return attributes
    if _BLOCKS[into[0]] not in parts:
        return attributes
    ends = (0, queries, queries + others, queries + 2 * others)
    share = [str(Fraction(end, ends[-1])) for end in ends[into[0] : into[0] + 2]]
    return {**attributes, "into": share}
