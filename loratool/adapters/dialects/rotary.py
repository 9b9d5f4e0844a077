"""Rows of q and k where a dialect has the two halves of each rotary pair side by side."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapters.adapter import Adapter
from loratool.errors import listed
from loratool.models.heads import Heads, pairs_apart
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo
from loratool.words import counted


class RotaryRows:
    """Brings rows of q and k into the order of Hugging Face, by the heads of the base.

    What it cannot bring there, because nobody says how many heads there are or the rows are not
    theirs, it collects; `note` refuses that in one notice.
    """

    def __init__(self, heads: Heads | None) -> None:
        self._heads = heads
        self._unknown: list[str] = []
        self._wrong: list[str] = []

    def ordered(self, info: TensorInfo, what: str, kv: bool) -> TensorInfo:
        """A tensor with the rows of q, or with `kv` of k, of the module or weight `what`."""
        heads = self._heads
        if heads is None:
            self._unknown.append(what)
            return info
        count = heads.kv if kv else heads.query
        if info.shape[:1] != (count * heads.size,) or heads.size % 2:
            rows = info.shape[0] if info.shape else 1
            self._wrong.append(f"{what}: {rows} rows, {counted(count, 'head')} of {heads.size}")
            return info
        return pairs_apart(info, count)

    def note(self, adapter: Adapter, where: Sequence[str]) -> None:
        """Refuse what was not brought into order; `where` are the files that say how many heads
        there are."""
        if self._unknown:
            text = (
                f"{counted(len(self._unknown), 'weight', 'has')} the rows of q and k in rotary "
                "pairs, and which rows are a pair depends on the number of heads. "
                f"{' or '.join(where)} says it: give the base (--base), with its config."
            )
            adapter.notices.append(Notice("row-order", text, self._unknown[0], refused=True))
        if self._wrong:
            text = (
                f"{counted(len(self._wrong), 'weight', 'has')} other rows than the heads by the "
                f"config have:\n{listed(self._wrong)}"
            )
            where_it_is = self._wrong[0].partition(":")[0]
            adapter.notices.append(Notice("row-order", text, where_it_is, refused=True))
