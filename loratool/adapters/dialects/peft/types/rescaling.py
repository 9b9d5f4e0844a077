"""(IA)³: rows of a weight and of its bias, or columns of a weight, times a vector.

Source: peft/tuners/ia3/layer.py (`merge`); which side it is, model.py
(`_check_target_module_feedforward`), and the shape of the vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.automaton import Automaton, Effort, PatternError
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.storage.fields import ABSENT, NAMES, TEXT, value_text


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


IA3 = PeftMethod(
    "IA3", "(IA)³", ("ia3_l",), _ia3, {"feedforward_modules": NAMES | TEXT | ABSENT},
    frozenset({"init_ia3_weights"}), shown=("feedforward_modules",),
)  # fmt: skip
