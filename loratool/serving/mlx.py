"""What mlx-lm 0.32.2 takes as adapter_path: its own format, by a run."""

from __future__ import annotations

from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting

_TUNER = "mlx-lm 0.32.2, adapter_path"


def _base_changed(t: Traits, setting: Setting) -> str:
    found = t.changed_base or "layer_replication" * t.sets("layer_replication")
    return f"{found}: it would be applied to the base as published" if found else ""


RULES = (ServingRule("differs", "initialisation", _base_changed, "merge", _TUNER),)

MLX = ServingProgram("mlx", "mlx-lm", "0.32.2", RULES, ("mlx",), (), "mlx", _TUNER)
