"""(IA)³, RoAd and BEFT: rows or columns of a weight, and its bias, times and plus a vector.

Sources: `merge` in peft/tuners/ia3/layer.py (which side is scaled, model.py says, in
`_check_target_module_feedforward`, and the shape of the vector), peft/tuners/road/layer.py
and peft/tuners/beft/layer.py.
"""

from __future__ import annotations

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
BEFT = PeftMethod("BEFT", "BEFT", ("beft_bias",), _beft)
