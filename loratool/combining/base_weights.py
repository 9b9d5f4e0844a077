"""The weights of a base model that adapters change, held against what they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.errors import MatchError, listed
from loratool.linalg.intruders import BaseDirections
from loratool.linalg.lowrank import Decomposition, Factor
from loratool.merging.matching import Delta, match
from loratool.models.checkpoint import open_checkpoint
from loratool.models.layouts.layout import Layout
from loratool.models.quantised import refuse_quantised
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32
from loratool.words import agreeing, counted


class BaseWeights:
    """Which base weight each module adapts, for counting intruder dimensions."""

    def __init__(
        self, base: str | Path, adapters: Sequence[Adapter], components: Sequence[str] = ()
    ) -> None:
        self._base = open_checkpoint(base)
        refuse_quantised(self._base)
        layout = Layout(self._base, components)
        self._deltas: dict[str, Delta] = {}
        self._tied = layout.tied.embedding if layout.tied is not None else None
        self.notices: list[Notice] = []
        lost = []
        for adapter in adapters:
            placed = match(adapter, layout)
            lost += [f"{what}: {reason}" for what, reason in placed.unmatched]
            self._deltas |= {d.factors.path: d for d in placed.deltas}
        self.notices += [*self._base.notices, *layout.notices]
        if not self._deltas:
            raise MatchError(
                f"No module of the adapters is in the base {base}:\n{listed(lost)}",
                "Give the base model they were trained on.",
            )
        wanted = {d.tensor for d in self._deltas.values()} | {str(self._tied)}
        self._base.fetch(wanted & self._base.tensors.keys())
        if lost:
            does = agreeing(len(lost), "does")
            text = f"{counted(len(lost), 'part')} of the adapters {does} not fit this base:\n"
            text += listed(lost)
            self.notices.append(Notice("unmatched", text, str(base)))

    def intruders(
        self, path: str, found: dict[int, Decomposition], files: FilePool
    ) -> dict[int, int]:
        """The count by adapter; empty for embeddings, and where the base lacks the module."""
        delta = self._deltas.get(path)
        if delta is None or delta.factors.kind == "embedding":
            return {}
        base = BaseDirections(self._weight(delta, files))
        return {i: base.intruders(*own.factors()) for i, own in found.items()}

    def _weight(self, delta: Delta, files: FilePool) -> Factor:
        info = self._base.tensors.get(delta.tensor) or self._base.tensors[str(self._tied)]
        return delta.place.part(read_float32(info, files))
