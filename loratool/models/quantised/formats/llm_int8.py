"""int8 of bitsandbytes (LLM.int8()), with one scale per row.

Source: bitsandbytes/nn/modules.py (`Linear8bitLt._save_to_state_dict`), bitsandbytes/functional.py
(`int8_vectorwise_dequant`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loratool.models.quantised.module import Format, Module, roles
from loratool.models.quantised.numbers import (
    encode_integers,
)
from loratool.models.quantised.scheme import (
    Floats,
    HeldPart,
    Opened,
    Scheme,
    SnappingRows,
    read_finite,
)
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import values_of

#: What the library multiplies by, for 1/127.
ONE_127TH = np.float32(7.874015718698502e-3)

#: Orders of the bytes by `weight_format`. Those of GPUs' kernels are no longer written.
_ORDERS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


@dataclass(frozen=True)
class EightBit(Scheme):
    """LLM.int8(): `float32(code)·SCB[row]·(1/127)`, in this order."""

    #: Conv1D of GPT-2 is quantised as `[out, in]`, while the plain file has `[in, out]`.
    turned: bool = False

    @property
    def title(self) -> str:
        return "int8"

    @property
    def bits(self) -> int:
        return 8

    @property
    def on_load(self) -> bool:
        return True

    @property
    def snaps(self) -> bool:
        return not self.turned

    def opened(self, files: FilePool) -> Opened:
        return _EightBitRows(self, files)


class _EightBitRows(SnappingRows):
    def __init__(self, scheme: EightBit, files: FilePool) -> None:
        codes = scheme.parts["weight"]
        self._scales = read_finite(scheme.parts["SCB"], files, times=128)
        self._codes = values_of(codes, files)
        self._stored = codes.shape
        self._held = HeldPart(codes, files) if scheme.turned else None

    def rows(self, first: int, last: int, out: Floats) -> None:
        width = self._stored[1]
        if self._held is not None:  # columns of what is stored, from all of its rows
            out[:] = self._held.raw().view(np.int8).reshape(self._stored)[:, first:last].T
            out *= self._scales
        else:
            codes = self._codes.bytes(first * width, last * width).view(np.int8)
            out[:] = codes.reshape(-1, width)
            out *= self._scales[first:last, None]
        out *= ONE_127TH

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        self.rows(first, last, out)
        half = self._scales * (ONE_127TH * np.float32(0.5 if upper else -0.5))
        out += half if self._held is not None else half[first:last, None]

    def snap(self, first: int, values: Floats) -> Bytes:
        scales = self._scales[first : first + len(values), None]
        divisors = np.where(scales == 0, np.float32(1), scales)
        values /= divisors * ONE_127TH
        codes = encode_integers(values, -128, 127)
        values[:] = codes
        values *= scales
        values *= ONE_127TH
        return codes.reshape(-1).view(np.uint8)


def _eight_bit(module: Module) -> EightBit:
    weight, scales = module.want("weight", "int8"), module.want("SCB", "int8")
    module.want_dtype(weight, "I8")
    if len(weight.shape) != 2:
        module.refuse(f"{weight} is no matrix")
    module.want_dtype(scales, "F32", "F16", "BF16")
    module.want_shape(scales, weight.shape[:1])
    order = module.tensors.get("weight_format")  # older versions had none, for rows
    if order is not None:
        module.want_dtype(order, "U8")
        module.want_shape(order, (), (1,))
        code = module.described["weight_format"][0]
        if code:
            module.refuse(
                f"its codes are packed for a kernel ({_ORDERS.get(code, 'unknown')}, "
                f"weight_format {code}), expected rows (0)",
                "Load it with the bitsandbytes that wrote it, and save it again.",
            )
    turned = module.is_conv1d
    shape = weight.shape[::-1] if turned else weight.shape
    parts = {"weight": weight, "SCB": scales}
    return EightBit(shape, parts, module.beside(parts, ("weight_format",)), turned)


FORMATS = (
    Format(
        "bitsandbytes int8",
        roles((r"(.+)\.(SCB|weight_format)", r"\1.weight", r"\2")),
        lambda module: bool(module.tensors.keys() & {"SCB", "weight_format"}),
        _eight_bit,
        descriptions=("weight_format",),
    ),
)
