"""AdaLoRA: B·diag(E)·A, with a budget of directions that are dropped while it trains.

PEFT divides alpha by the rank that training began with, also where directions were dropped since,
and by a small number more. Source: peft/tuners/adalora/layer.py (`get_delta_weight`) and model.py
(`resize_modules_by_rank_pattern`, which puts `ranknum` back).
"""

from __future__ import annotations

from collections.abc import Iterable

from loratool.adapters.dialects.peft.config import HARMLESS, HONOURED, REFUSED
from loratool.adapters.dialects.peft.types.making import Array, computed_factor, computed_pair
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.told import scaling
from loratool.storage.fields import NUMBER

#: What PEFT adds to the rank.
_MORE = 1e-5

_SCHEDULE = frozenset({
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
})  # fmt: skip
#: What LoRA has, and AdaLoRA's layers do not look at, or refuse.
_REFUSED = {
    **REFUSED,
    "use_dora": "PEFT has no AdaLoRA with DoRA",
    "use_bdlora": "PEFT has no AdaLoRA with blocks",
    "lora_bias": "PEFT has no AdaLoRA with biases of its own",
    "target_parameters": "PEFT has no AdaLoRA of bare parameters",
}


def _adalora(module: PeftModule) -> Iterable[Made]:
    b, a, e = module.need("lora_B", "lora_A", "lora_E")
    module.require(len(a.shape) == len(b.shape) == 2 and e.shape == (a.shape[0], 1))
    module.require(b.shape[1] == a.shape[0])
    first = module.config.get("init_r", 12)
    if first < 1 or first != int(first):
        raise Trouble("rank-mismatch", f"init_r of the config is {first}")
    if a.shape[0] > first:
        raise Trouble("rank-mismatch", f"the config gives {first:g}, lora_A has {a.shape[0]}")
    alpha = module.config.get("lora_alpha", 8)
    scaled = scaling(
        module.adapter.told, first + _MORE, alpha=alpha if alpha > 0 else first, where=module.path
    )
    scaled_a = computed_factor(f"{a.name} · E", a.shape, [a, e], _rows_scaled)
    yield computed_pair(module, "AdaLoRA", b, scaled_a, scaled, flat=True)


def _rows_scaled(a: Array, e: Array) -> Array:
    return a * e


ADALORA = PeftMethod(
    "ADALORA", "AdaLoRA", ("lora_[ABE]",), _adalora,
    {"init_r": NUMBER, "lora_alpha": NUMBER},
    frozenset((HONOURED | HARMLESS) - _REFUSED.keys()) | _SCHEDULE, _REFUSED,
    shown=("init_r", "lora_alpha"),
)  # fmt: skip
