"""(IA)³, RoAd, HiRA, GLoRA and BEFT: elements of a weight and of a bias, times and plus others.

Sources: `merge` in peft/tuners/ia3/layer.py (which side is scaled, model.py says, in
`_check_target_module_feedforward`, and the shape of the vector), peft/tuners/road/layer.py,
peft/tuners/hira/layer.py, peft/tuners/glora/layer.py and peft/tuners/beft/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.automaton import Automaton, Effort, PatternError
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.storage.fields import ABSENT, COUNT, NAMES, TEXT, value_text


def _ia3(module: PeftModule) -> Iterable[Made]:
    (vector,) = module.need("ia3_l")
    shape, count = vector.shape, vector.numel
    if len(shape) == 2 and shape != (1, 1):
        module.require(1 in shape)
        inputs = shape[0] == 1
    else:
        module.require(len(shape) >= 2 and shape[1] == count)
        inputs = _is_feedforward(module)
    parts = {"l": vector}
    if inputs and len(shape) > 2:
        yield RowFunction(module.path, "(IA)³", parts, (0, 0), _of_columns, channels=count)
    elif inputs:
        yield RowFunction(module.path, "(IA)³", parts, (0, count), _of_columns, _of_rows)
    else:
        yield RowFunction(module.path, "(IA)³", parts, (count, 0), _of_rows, _of_columns)
        yield RowFunction(
            module.path, "(IA)³", parts, (count, 0), _of_rows, leaf="bias", optional=True
        )


def _is_feedforward(module: PeftModule) -> bool:
    """Whether inputs are scaled, by feedforward_modules of the config."""
    chosen = module.config.get("feedforward_modules") or []
    if not isinstance(chosen, str):
        return any(module.path.endswith(name) for name in chosen)
    try:
        return Automaton(f"({chosen})$", Effort()).matches(module.path)
    except PatternError as error:
        text = f"feedforward_modules {value_text(chosen)} cannot be used: {error}"
        raise Trouble("peft-options", text) from None


def _of_rows(l: Float64) -> Rows:  # noqa: E741
    return partial(_rows_times, l.reshape(-1, 1))


def _rows_times(vector: Float64, first: int, rows: Float64) -> Float64:
    return rows * vector[first : first + len(rows)]


def _of_columns(l: Float64) -> Rows:  # noqa: E741
    return partial(_columns_times, l.reshape(1, -1))


def _columns_times(vector: Float64, first: int, rows: Float64) -> Float64:
    # Of a convolution each channel has the elements of a kernel.
    return rows * np.repeat(vector, rows.shape[1] // vector.shape[1], axis=1)


def _road(module: PeftModule) -> Iterable[Made]:
    config = module.config
    turns, scales = module.need("road_theta", "road_alpha")
    module.require(len(turns.shape) == 1 and turns.shape == scales.shape)
    variant, group = config.get("variant", "road_1"), config.get("group_size", 64)
    if variant not in _ROAD:
        text = f"variant {value_text(variant)} is none of {', '.join(_ROAD)}"
        raise Trouble("peft-options", text)
    out = int(turns.numel / _ROAD[variant])
    module.require(group > 1 and group % 2 == 0 and out % group == 0)
    parts = {"theta": turns, "alpha": scales}
    rows = partial(_turned_pairs, variant=variant, group=group)
    yield RowFunction(module.path, "RoAd", parts, (out, 0), rows, step=group)
    yield RowFunction(
        module.path, "RoAd", parts, (out, 0), rows, step=group, leaf="bias", optional=True
    )


#: Numbers per row of the weight, by variant.
_ROAD = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def _turned_pairs(theta: Float64, alpha: Float64, *, variant: str, group: int) -> Rows:
    """Rows of one half of a group are turned with those of the other half."""
    half = group // 2
    if variant == "road_1":
        theta, alpha = (np.repeat(x.reshape(-1, half), 2, axis=0) for x in (theta, alpha))
    if variant == "road_4":
        theta, alpha = (x.reshape(-1, 2, group) for x in (theta, alpha))
        own, other = alpha[:, 0] * np.cos(theta[:, 0]), alpha[:, 1] * np.sin(theta[:, 1])
    else:
        own, other = alpha * np.cos(theta), alpha * np.sin(theta)
    return partial(_mixed_rows, own.reshape(-1, 2, half, 1), other.reshape(-1, 2, half, 1))


def _mixed_rows(own: Float64, other: Float64, first: int, rows: Float64) -> Float64:
    _, _, half, _ = own.shape
    apart = rows.reshape(-1, 2, half, rows.shape[1])
    groups = slice(first // (2 * half), first // (2 * half) + len(apart))
    crossed = np.stack([-apart[:, 1], apart[:, 0]], axis=1)
    mixed: Float64 = apart * own[groups] + crossed * other[groups]
    return mixed.reshape(rows.shape)


def _hira(module: PeftModule) -> Iterable[Made]:
    tokens = "hira_embedding_A" in module.tensors
    name = "hira_embedding" if tokens else "hira"
    a, b = module.need(f"{name}_A", f"{name}_B")
    module.require(len(a.shape) == len(b.shape) >= 2 and b.shape[1] == a.shape[0])
    module.require(math.prod(b.shape[2:]) == 1)
    out, width = b.shape[0], math.prod(a.shape[1:])
    if tokens:  # its weight is the transpose of what B·A is for
        yield RowFunction(module.path, "HiRA", {"A": a, "B": b}, (width, out), _columns_gained)
    else:
        yield RowFunction(
            module.path, "HiRA", {"A": a, "B": b}, (out, width), _rows_gained, _columns_gained
        )


def _rows_gained(A: Float64, B: Float64) -> Rows:
    """W ∘ (1 + B·A)."""
    return partial(_gained, B.reshape(len(B), -1), A.reshape(len(A), -1))


def _columns_gained(A: Float64, B: Float64) -> Rows:
    """The same for a weight that is stored transposed."""
    return partial(_gained, A.reshape(len(A), -1).T, B.reshape(len(B), -1).T)


def _gained(left: Float64, right: Float64, first: int, rows: Float64) -> Float64:
    return rows * (1 + left[first : first + len(rows)] @ right)


def _glora(module: PeftModule) -> Iterable[Made]:
    """W + W∘A + B, and for a bias b + b∘D + E; each of them low-rank, a vector or one number."""
    if not any(slot.endswith("zeros") for slot in module.tensors if slot.startswith("glora_C")):
        raise Trouble(
            "peft-options", "config_C is set: the bias gets a product with the weight; merge it "
            "with PEFT, then `loratool extract`"
        )  # fmt: skip
    slots = sorted(slot for slot in module.tensors if slot[6] in "AB")
    shape = (0, 0)
    for slot in slots:
        info = module.tensors[slot]
        module.require(len(info.shape) == 2 or info.shape == (1,))
        end = slot.partition(".")[2]
        if len(info.shape) == 2 and end != "Xu":
            shape = info.shape[0], info.shape[1] if end == "zeros" else shape[1]
        elif end == "Xu":
            shape = shape[0], info.shape[1]
    parts = {slot.replace(".", "_"): module.tensors[slot] for slot in slots}
    yield RowFunction(module.path, "GLoRA", parts, shape, _times_plus)
    slots = sorted(slot for slot in module.tensors if slot[6] in "DE")
    parts = {slot.replace(".", "_"): module.tensors[slot] for slot in slots}
    yield RowFunction(module.path, "GLoRA", parts, (0, 0), _times_plus, leaf="bias", optional=True)


def _times_plus(**parts: Float64) -> Rows:
    gains, added = ({k[8:]: v for k, v in parts.items() if k[6] in which} for which in ("AD", "BE"))
    return partial(_changed_by, gains, added)


def _changed_by(
    gains: dict[str, Float64], added: dict[str, Float64], first: int, rows: Float64
) -> Float64:
    own = slice(first, first + len(rows))
    changed: Float64 = rows + rows * _path(gains, own) + _path(added, own)
    return changed


def _path(found: dict[str, Float64], rows: slice) -> Float64:
    """What one of GLoRA's paths gives for some rows: a matrix, a column or a number."""
    if "Xd" in found:
        product: Float64 = found["Xd"][rows] @ found["Xu"]
        return product
    (whole,) = found.values()
    if whole.shape == (1,):
        return whole
    return whole.reshape(len(whole), -1)[rows]


def _beft(module: PeftModule) -> Iterable[Made]:
    (vector,) = module.need("beft_bias")
    module.require(len(vector.shape) == 2 and vector.shape[0] == 1)
    count = vector.numel
    yield RowFunction(module.path, "BEFT", {"v": vector}, (count, 0), _shifted, leaf="bias")


def _shifted(v: Float64) -> Rows:
    return partial(_rows_plus, v.reshape(-1, 1))


def _rows_plus(vector: Float64, first: int, rows: Float64) -> Float64:
    return rows + vector[first : first + len(rows)]


IA3 = PeftMethod(
    "IA3", "(IA)³", ("ia3_l",), _ia3, {"feedforward_modules": NAMES | TEXT | ABSENT},
    frozenset({"init_ia3_weights"}), shown=("feedforward_modules",),
)  # fmt: skip
ROAD = PeftMethod(
    "ROAD", "RoAd", ("road_theta", "road_alpha"), _road, {"variant": TEXT, "group_size": COUNT},
    shown=("variant", "group_size"),
)  # fmt: skip
HIRA = PeftMethod(
    "HIRA", "HiRA", ("hira_(?:embedding_)?[AB]",), _hira, {},
    frozenset({"r", "rank_pattern", "hira_dropout"}), shown=("r",),
)  # fmt: skip
GLORA = PeftMethod(
    "GLORA", "GLoRA", ("glora_[ABCDE]",), _glora, {},
    frozenset({"r", "config_A_B", "config_C", "config_D_E"}),
    shown=("r", "config_A_B", "config_C", "config_D_E"), rest=r"\.(?:Xd|Xu|X|zeros)",
)  # fmt: skip
BEFT = PeftMethod("BEFT", "BEFT", ("beft_bias",), _beft)
