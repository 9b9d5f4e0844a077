"""State dicts of hand-written LoRA, as tutorials save them: no config, and names of their own."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.hand.fused import is_of_loralib
from loratool.adapters.dialects.hand.names import is_hand_written, may_be_hand_written
from loratool.adapters.dialects.hand.sorting import fill_hand_written
from loratool.adapters.dialects.multiplicative import multiply
from loratool.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Hand(Dialect):
    """LoRA whose alpha is in a training script, and whose product is decided by shapes."""

    name: str = "hand"

    def claims(self, evidence: Evidence) -> str | None:
        if is_of_loralib(evidence) or not is_hand_written(evidence):
            return None
        return "a state dict of hand-written LoRA"

    def accepts(self, evidence: Evidence) -> bool:
        return may_be_hand_written(evidence)

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        multiplied = adapter.told.kind == "multiplicative"
        fill_hand_written(adapter, base, only="BA" if multiplied else None)
        if multiplied:
            multiply(adapter, base)
