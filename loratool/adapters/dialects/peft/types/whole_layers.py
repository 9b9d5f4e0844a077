"""LayerNorm tuning: whole layers, trained.

Source: peft/tuners/ln_tuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Replacement


def _ln_tuning(module: PeftModule) -> Iterable[Made]:
    for slot, info in module.tensors.items():
        leaf = slot.partition(".")[2] or "weight"
        yield Replacement(f"{module.path}.{leaf}", info)


LN_TUNING = PeftMethod(
    "LN_TUNING", "LayerNorm tuning", ("ln_tuning_layers",), _ln_tuning, rest=r"(?:\.bias)?"
)
