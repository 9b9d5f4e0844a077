"""MLX: adapters.safetensors of mlx-lm and mlx-vlm, with factors transposed and one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.dialects.dialect import Dialect, Evidence
from loratool.adapters.dialects.mlx.config import (
    check_mlx,
    declared_by,
    is_of_mlx,
    is_of_vlm,
    kind_of_training,
)
from loratool.adapters.dialects.mlx.drafting import mlx_draft
from loratool.adapters.dialects.mlx.reading import FACTOR, OF_VLM, read_factors, read_whole
from loratool.adapters.dialects.writing import Asked, Draft, Writer
from loratool.adapters.told import refuse_contradictions
from loratool.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Mlx(Dialect, Writer):
    """LoRA and DoRA of linear layers, embeddings and experts, and whole tensors."""

    name: str = "mlx"

    def claims(self, evidence: Evidence) -> str | None:
        if evidence.top != "dict" or evidence.values:
            return None
        if is_of_mlx(evidence.config):
            return _WORDS.get(kind_of_training(evidence.config), _WORDS["lora"])
        if is_of_vlm(evidence.config) and any(map(OF_VLM.fullmatch, evidence.tensors)):
            return "an mlx-vlm LoRA adapter"
        # Scripts of torch name factors so, too; MLX writes no such files.
        mine = not evidence.in_torch and any(map(FACTOR.fullmatch, evidence.tensors))
        return _WORDS["lora"] if mine else None

    def check(self, config: dict[str, Any], where: object) -> None:
        check_mlx(config, where)

    def declared(self, config: dict[str, Any]) -> Declared:
        return declared_by(config)

    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        adapter.producer = "mlx-vlm" if is_of_vlm(adapter.config) else "mlx-lm"
        if kind_of_training(adapter.config) == "full":
            read_whole(adapter, base.model_type if base is not None else "")
        else:
            read_factors(adapter, base)
        ranks = {path: module.rank for path, module in adapter.modules.items()}
        refuse_contradictions(adapter.told, "factors of MLX", "ABt", ranks)

    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        return mlx_draft(adapter, asked)


_WORDS = {
    "lora": "an MLX LoRA adapter",
    "dora": "an MLX DoRA adapter",
    "full": "tensors that MLX trained whole",
}
