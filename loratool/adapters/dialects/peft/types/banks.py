"""VB-LoRA, Uni-LoRA and TinyLoRA: factors that are looked up in, or made of, shared vectors.

Sources: peft/tuners/vblora/layer.py and model.py, peft/tuners/unilora/layer.py,
peft/tuners/tinylora/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.dialects.peft.types.making import (
    Array,
    computed_factor,
    computed_pair,
    places_within,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.errors import AdapterError
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER
from loratool.storage.tensors import TensorInfo

#: How near to what was drawn a stored projection is, which may be in bfloat16.
_SAME = 0.02


def _vblora(module: PeftModule) -> Iterable[Made]:
    (bank,) = module.need_shared("vblora_vector_bank")
    module.require(len(bank.shape) == 2)
    parts = [_logits(module, side) for side in "AB"]
    (rank, across), (down, other) = (found[0].shape[:2] for found in parts)
    module.require(other == rank)
    length, topk = bank.shape[1], module.config.get("topk", 2)
    if len(parts[0]) == 1:
        module.require(all(found[0].shape[2] == bank.shape[0] >= topk > 0 for found in parts))
    a = computed_factor(
        f"{parts[0][0].name} of the bank", (rank, across * length), [bank, *parts[0]],
        partial(_mixed, topk, False),
    )  # fmt: skip
    b = computed_factor(
        f"{parts[1][0].name} of the bank", (down * length, rank), [bank, *parts[1]],
        partial(_mixed, topk, True),
    )  # fmt: skip
    yield computed_pair(module, "VB-LoRA", b, a, module.scaled())


def _logits(module: PeftModule, side: str) -> list[TensorInfo]:
    """All logits of A or B, or the numbers of the best ones and all but their last weight."""
    slot = f"vblora_logits_{side}"
    whole = module.tensors.get(slot)
    found = [whole] if whole else module.need(f"{slot}_topk_indices", f"{slot}_topk_weights")
    module.require(all(len(info.shape) == 3 for info in found))
    if whole is None:
        chosen, weights = found
        module.require(chosen.shape == (*weights.shape[:2], weights.shape[2] + 1))
    return found


def _mixed(topk: int, turned: bool, bank: Array, chosen: Array, *weights: Array) -> Array:
    """Vectors of the bank, mixed with the softmax of the largest logits, one after the other."""
    if weights:
        numbers = places_within(chosen, len(bank), "vblora_logits_topk_indices")
        shares = weights[0]
        shares = np.concatenate([shares, 1 - shares.sum(-1, keepdims=True)], axis=-1)
    else:
        numbers = np.argsort(-chosen, axis=-1, kind="stable")[..., :topk]
        largest = np.take_along_axis(chosen, numbers, -1)
        shares = np.exp(largest - largest[..., :1])
        shares /= shares.sum(-1, keepdims=True)
    vectors: Array = np.einsum("xyk,xykl->xyl", shares, bank[numbers])
    if turned:  # [runs of rows, rank, length]
        vectors = vectors.transpose(0, 2, 1)
        return vectors.reshape(-1, vectors.shape[2])
    return vectors.reshape(len(vectors), -1)


def _unilora(module: PeftModule) -> Iterable[Made]:
    (theta,) = module.need_shared("unilora_theta_d")
    module.require(len(theta.shape) == 1)
    factors = []
    for side in "BA":
        numbers, scales = module.need(f"unilora_indices_{side}", f"unilora_scales_{side}")
        module.require(len(numbers.shape) == 2 and numbers.shape == scales.shape)
        module.require(not numbers.is_float)
        parts = [theta, numbers, scales]
        factors.append(computed_factor(f"{numbers.name} of θ", numbers.shape, parts, _looked_up))
    b, a = factors
    module.require(b.shape[1] == a.shape[0])
    if a.shape[0] != module.config.get("r", 4):
        given = f"the config gives {module.config.get('r', 4)}"
        raise Trouble("rank-mismatch", f"{given}, unilora_indices_A has {a.shape[0]}")
    yield computed_pair(module, "Uni-LoRA", b, a, module.scaled())


def _looked_up(theta: Array, numbers: Array, scales: Array) -> Array:
    found: Array = theta[places_within(numbers, len(theta), "unilora_indices")] * scales
    return found


def _tinylora(module: PeftModule) -> Iterable[Made]:
    """Δ = B·(Σ vᵢ·Pᵢ)·A, where A and B are of the base's weight, and v is one of several."""
    b, a = module.need("tinylora_B", "tinylora_A")
    if "tinylora_P" not in module.tensors:
        text = (
            "its projection is drawn from a seed and the number of the module in its model, which "
            "no file tells. Load it with PEFT, set save_projection in its config, and save it"
        )
        raise Trouble("peft-options", text)
    (projection,) = module.need("tinylora_P")
    module.require(len(a.shape) == len(b.shape) == 2 and b.shape[1] == a.shape[0])
    config, rank = module.config, a.shape[0]
    module.require(len(projection.shape) == 3 and projection.shape[1:] == (rank, rank))
    if rank != min(config.get("r", 2), b.shape[0], a.shape[1]):
        raise Trouble("rank-mismatch", f"the config gives {config.get('r', 2)}, it has {rank}")
    count = sum("tinylora_A" in tensors for tensors in module.contents.modules.values())
    groups = max(1, round(count * (1.0 - config.get("weight_tying", 0.0))))
    size = max(1, count // groups)
    names = [f"tinylora_v.{i}" for i in range(min(groups, -(-count // size)))]
    vectors = module.need_shared(*names)
    if any(vector.shape != projection.shape[:1] for vector in vectors):
        shapes = [list(vector.shape) for vector in vectors]
        raise Trouble("pair-mismatch", f"tinylora_v {shapes}, P {list(projection.shape)}")
    projected = partial(_projected, module.path, config.get("projection_seed", 42), count, size)
    parts = [b, projection, *vectors]
    b = computed_factor(f"{b.name} · R", b.shape, parts, projected)
    yield computed_pair(module, "TinyLoRA", b, a, module.scaled())


def _projected(
    path: str, seed: int, count: int, size: int, b: Array, projection: Array, *vectors: Array
) -> Array:
    number = 0
    if len(vectors) > 1:
        place = _place_of(projection, seed, count)
        if place is None:
            raise AdapterError(
                f"{path}: tinylora_P is none of those that projection_seed {seed} of its config "
                "gives, so which tinylora_v is its own is not known.",
                "Correct projection_seed in adapter_config.json.",
            )
        number = min(place // size, len(vectors) - 1)
    found: Array = b @ np.tensordot(vectors[number], projection, axes=1)
    return found


def _place_of(projection: Array, seed: int, count: int) -> int | None:
    """Which of `count` modules has this projection, as PEFT draws it from the seed plus its number.

    Which module has which number depends on the order in which its model registers them.
    """
    import torch

    rank = projection.shape[-1]
    for place in range(count):
        generator = torch.Generator(device="cpu").manual_seed(seed + place)
        drawn = torch.normal(0.0, 1.0 / rank**0.5, size=projection.shape, generator=generator)
        if np.abs(drawn.numpy() - projection).max() < _SAME:
            return place
    return None


VBLORA = PeftMethod(
    "VBLORA", "VB-LoRA", ("vblora_logits_[AB](?:_topk_(?:indices|weights))?", "vblora_vector_bank"),
    _vblora, {"topk": COUNT},
    frozenset({
        "r", "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout",
        "init_vector_bank_bound", "init_logits_std",
    }), shown=("r", "num_vectors", "vector_length", "topk"),
)  # fmt: skip
UNILORA = PeftMethod(
    "UNILORA", "Uni-LoRA", ("unilora_(?:indices|scales)_[AB]", "unilora_theta_d"), _unilora,
    {"r": COUNT}, frozenset({
        "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "save_indices",
    }), shown=("r", "theta_d_length"),
)  # fmt: skip
TINYLORA = PeftMethod(
    "TINYLORA", "TinyLoRA", ("tinylora_[ABPv]",), _tinylora,
    {"r": COUNT, "u": COUNT, "weight_tying": NUMBER, "projection_seed": COUNT,
     "save_projection": FLAG | ABSENT},
    frozenset({"init_v_bound", "tinylora_dropout"}),
    shown=("r", "u", "weight_tying"), rest=r"(?:\.\d+)?",
)  # fmt: skip
