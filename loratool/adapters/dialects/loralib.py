"""loralib: `lora_A` and `lora_B` as bare parameters, for parts of fused weights too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.hand.fused import is_of_loralib
from loratool.adapters.dialects.hand.names import may_be_hand_written
from loratool.adapters.dialects.hand.sorting import fill_hand_written
from loratool.adapters.told import refuse_contradictions
from loratool.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Loralib(Dialect):
    """State dicts of loralib: linear layers, embeddings, MergedLinear and convolutions.

    Without a MergedLinear they are those of hand-written classes, and are read so; the factors
    multiply as B·A here, whatever shapes would also allow.
    """

    name: str = "loralib"

    def claims(self, evidence: Evidence) -> str | None:
        return "a state dict of loralib" if is_of_loralib(evidence) else None

    def accepts(self, evidence: Evidence) -> bool:
        return may_be_hand_written(evidence)

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        told = replace(adapter.told, rank=None, enable_lora={}, fan_in_fan_out=())
        refuse_contradictions(told, "factors of loralib", "BA", {})
        fill_hand_written(adapter, base, only="BA")
