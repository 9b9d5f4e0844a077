"""The weights of a base model that adapters change, held against what they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.errors import MatchError, by_cause
from loratool.linalg.intruders import BaseDirections
from loratool.linalg.lowrank import Decomposition
from loratool.merging.coverage import note_broken_base
from loratool.merging.match import Delta
from loratool.merging.matching import match
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.assembly import view_of
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.place import Place
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.treatment import leftover, note_leftover
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32
from loratool.words import agreeing, counted


class BaseWeights:
    """Which base weight each module adapts, for counting intruder dimensions."""

    def __init__(
        self, base: Checkpoint, adapters: Sequence[Adapter], components: Sequence[str] = ()
    ) -> None:
        self._base = base
        layout = Layout(self._base, components)
        self._deltas: dict[str, Delta] = {}
        self._tied = layout.tied.embedding if layout.tied is not None else None
        self._notices: list[Notice] = []
        #: Tensors that are not all numbers; threads add to it.
        self._broken: set[str] = set()
        lost: list[tuple[str, str]] = []
        for adapter in adapters:
            placed = match(adapter, layout)
            lost += placed.unmatched
            self._deltas |= {d.factors.path: d for d in placed.deltas}
        self._notices += [*self._base.notices, *layout.notices]
        if not isinstance(self._base, Dequantised) and leftover(self._base):
            self._notices.append(note_leftover(self._base))
        if not self._deltas:
            raise MatchError(
                f"No module of the adapters is in the base {base.label}:\n{by_cause(lost)}",
                "Give the base model they were trained on.",
            )
        wanted = {d.tensor for d in self._deltas.values()} | {str(self._tied)}
        self._base.fetch(wanted & self._base.tensors.keys())
        if lost:
            does = agreeing(len(lost), "does")
            text = f"{counted(len(lost), 'part')} of the adapters {does} not fit this base:\n"
            text += by_cause(lost)
            self._notices.append(Notice("unmatched", text, base.label))

    def intruders(
        self, path: str, found: dict[int, Decomposition], files: FilePool
    ) -> dict[int, int]:
        """The count by adapter; empty for embeddings, and where the base lacks the module or holds
        no numbers."""
        delta = self._deltas.get(path)
        if delta is None or delta.factors.kind == "embedding":
            return {}
        info = self._base.tensors.get(delta.tensor) or self._base.tensors[str(self._tied)]
        place = delta.place
        if place.expert is not None:  # of a stack only its own matrix is read
            info = next(view_of(info, Place(place.tensor, expert=place.expert)))
            place = replace(place, expert=None)
        weight = place.part(read_float32(info, files))
        if not np.isfinite(weight).all():
            self._broken.add(info.name)
            return {}
        found = {i: own for i, own in found.items() if weight.shape == (len(own.b), own.a.shape[1])}
        if not found:  # a part of what the adapter has in one: gate and up of an expert
            return {}
        base = BaseDirections(weight)
        return {i: base.intruders(*own.factors()) for i, own in found.items()}

    @property
    def notices(self) -> list[Notice]:
        """What is odd about the base, as far as it was looked at."""
        broken = [note_broken_base(self._base, sorted(self._broken))] if self._broken else []
        return [*self._notices, *broken]
