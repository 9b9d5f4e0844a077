"""llama.cpp's adapters: factors by tensor in a GGUF file, typed values in its header."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.gguf.drafting import gguf_draft
from loratool.adapters.dialects.gguf.reading import ADAPTER_KIND, FACTOR, KIND, fill_gguf
from loratool.adapters.dialects.writing import Asked, Draft, Writer
from loratool.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Gguf(Dialect, Writer):
    """LoRA as convert_lora_to_gguf.py of llama.cpp writes it."""

    name: str = "gguf"
    needs_base: bool = True

    def claims(self, evidence: Evidence) -> str | None:
        values = evidence.values
        kinds = values.get(KIND, "adapter"), values.get(ADAPTER_KIND, "lora")
        mine = kinds == ("adapter", "lora") and any(map(FACTOR.fullmatch, evidence.tensors))
        return "a llama.cpp LoRA adapter (GGUF)" if values and mine else None

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        fill_gguf(adapter, base)

    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        return gguf_draft(adapter, asked)
