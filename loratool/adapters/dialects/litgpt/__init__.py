"""litgpt: lit_model.pth.lora beside hyperparameters.yaml and model_config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.litgpt.config import LitConfig, is_of_litgpt, lit_config
from loratool.adapters.dialects.litgpt.drafting import litgpt_draft
from loratool.adapters.dialects.litgpt.families import family_of
from loratool.adapters.dialects.litgpt.reading import KEY, OWN, Reader
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.dialects.writing import Asked, Draft, Writer
from loratool.adapters.told import refuse_contradictions
from loratool.models.checkpoint import Checkpoint
from loratool.models.heads import heads_of
from loratool.notices import Notice


@dataclass(frozen=True)
class Litgpt(Dialect, Writer):
    """LoRA as `litgpt finetune_lora` saves it."""

    name: str = "litgpt"
    needs_base: bool = True

    def claims(self, evidence: Evidence) -> str | None:
        if evidence.top != "dict":
            return None
        named = any(map(KEY.fullmatch, evidence.tensors)) and is_of_litgpt(evidence.folder)
        return "a litgpt adapter" if named or any(map(OWN.fullmatch, evidence.tensors)) else None

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        adapter.producer = "litgpt"
        config = lit_config(adapter.folder)
        said = {"r": config.run.get("lora_r"), "alpha": config.run.get("lora_alpha")}
        words = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        adapter.declared = replace(
            adapter.declared, settings=(("configured", words),) if words else ()
        )
        family = family_of(config.model, base.model_type if base is not None else "")
        of_base = heads_of(base.config) if base is not None else None
        Reader(adapter, config, family, config.heads or of_base).read()
        if family is None:
            text = (
                "What its modules are called on the Hub depends on the family of the model: say "
                "--base, or put model_config.yaml beside the file."
            )
            adapter.notices.append(Notice("other-family", text, str(adapter.weights), refused=True))
        _note_other_heads(adapter, config, base)
        refuse_empty(adapter)
        refuse_shapes(adapter, {})
        refuse_unknown(adapter)
        refuse_without_scale(adapter)
        told = replace(adapter.told, enable_lora={}, rank=None)
        refuse_contradictions(told, "factors of litgpt", "BA", {})

    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        return litgpt_draft(adapter, asked)


def _note_other_heads(adapter: Adapter, config: LitConfig, base: Checkpoint | None) -> None:
    """Refuse a base whose heads are not those that the adapter was trained with."""
    own, other = config.heads, heads_of(base.config) if base is not None else None
    if own and other and (own.query, own.size) != (other.query, other.size):
        text = (
            f"model_config.yaml says {own.query} heads of {own.size}, the base's config.json "
            f"{other.query} of {other.size}: it is another model."
        )
        adapter.notices.append(Notice("other-family", text, str(adapter.weights), refused=True))
