"""AWQ as AutoAWQ's GEMM has it: 4-bit codes along the outputs, eight in a word, out of order.

Source: awq/modules/linear/gemm.py (`WQLinear_GEMM.from_linear`). Before it was quantised the model
was rescaled: inputs that matter more are larger there, and what makes them smaller again lies in
the layer before. So the weights are not those of the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import multiply_groups, subtract_groups, thread_buffer
from loratool.models.quantised.scheme import (
    Floats,
    HeldPart,
    OnGrid,
    Scheme,
    read_finite,
    read_part,
)
from loratool.storage.fields import value_text
from loratool.storage.tensors import Bytes, FilePool

#: The output, of eight, whose code is in each nibble of a word, the lowest first.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Scheme):
    """Codes `[in, out/8]` in words, `(code − zero)·scale` with those of the input's group."""

    @property
    def title(self) -> str:
        return "AWQ 4 bit"

    @property
    def bits(self) -> int:
        return 4

    @property
    def rescaled(self) -> bool:
        return True

    @property
    def is_nearest(self) -> bool:
        return False

    def opened(self, files: FilePool) -> OnGrid:
        return _Rows(self, files)


class _Rows(OnGrid):
    def __init__(self, scheme: Awq, files: FilePool) -> None:
        parts = scheme.parts
        self._words = HeldPart(parts["qweight"], files)
        self._stored = parts["qweight"].shape
        self._scales = np.ascontiguousarray(read_finite(parts["scales"], files, times=16).T)
        zeros = read_part(parts["qzeros"], files)
        self._zeros = np.empty(self._scales.shape, np.float32)
        _unpack(zeros, parts["qzeros"].shape, 0, self._zeros)
        self._group = scheme.shape[1] // self._scales.shape[1]

    def rows(self, first: int, last: int, out: Floats) -> None:
        low, high = first // 8, -(-last // 8)
        whole = out
        if (low * 8, high * 8) != (first, last):
            count = 8 * (high - low)
            whole = thread_buffer("eights", count * out.shape[1], np.float32).reshape(count, -1)
        _unpack(self._words.raw(), self._stored, low, whole)
        if whole is not out:
            out[:] = whole[first - low * 8 :][: len(out)]
        scales, zeros, group = self.grid(first, last)
        subtract_groups(out, zeros, group)
        multiply_groups(out, scales, group)

    def grid(self, first: int, last: int) -> tuple[Floats, Floats, int]:
        return self._scales[first:last], self._zeros[first:last], self._group


def _unpack(raw: Bytes, stored: tuple[int, ...], low: int, out: Floats) -> None:
    """Fill `out`, `[outputs, inputs]`, with the codes in words `[inputs, outputs/8]`, from word
    `low` of each row on."""
    outputs, inputs = out.shape
    some = raw.view("<u4").reshape(stored)[:, low : low + outputs // 8]
    words = np.ascontiguousarray(some.T)
    places = out.reshape(-1, 8, inputs)
    for nibble, output in enumerate(_ORDER):
        places[:, output] = words >> np.uint32(4 * nibble) & np.uint32(15)


def in_words(codes: Floats) -> npt.NDArray[np.uint32]:
    """Codes of outputs, `[n, inputs]`, n a multiple of eight, as the words that hold them:
    `[n/8, inputs]`."""
    places = codes.astype(np.uint32).reshape(len(codes) // 8, 8, -1)
    words = np.zeros((len(places), places.shape[2]), np.uint32)
    for nibble, output in enumerate(_ORDER):
        words |= places[:, output] << np.uint32(4 * nibble)
    return words


def _scheme(module: Module) -> Awq:
    words, zeros, scales = (module.want(role, "AWQ") for role in ("qweight", "qzeros", "scales"))
    table = module.settings.table
    bits = table.get("bits", table.get("w_bit", 4))
    if bits != 4:
        module.refuse(f"its codes have {value_text(bits)} bits, expected 4")
    for key in ("version", "format", "checkpoint_format"):
        said = table.get(key)
        if said is not None and str(said).lower() != "gemm":
            module.refuse(f"its {key} is {value_text(said)}, expected gemm", UNQUANTISED)
    for info in (words, zeros):
        module.want_dtype(info, "I32")
    module.want_dtype(scales, "F16", "BF16", "F32")
    for info in (words, zeros, scales):
        if len(info.shape) != 2 or not info.numel:
            module.refuse(f"{info} is no matrix")
    inputs, outputs = words.shape[0], 8 * words.shape[1]
    said = table.get("group_size", table.get("q_group_size"))
    groups = scales.shape[0]
    if type(said) is int and (said == -1 or said > 0):
        groups = 1 if said == -1 else -(-inputs // said)
    module.want_shape(scales, (groups, outputs))
    module.want_shape(zeros, (groups, words.shape[1]))
    if inputs % groups or (type(said) is int and said > 0 and inputs % said):
        module.refuse(f"its {inputs} inputs are no whole number of groups ({groups})")
    parts = {"qweight": words, "qzeros": zeros, "scales": scales}
    return Awq((outputs, inputs), parts, module.beside(parts))


def _claims(module: Module) -> bool:
    """A module of a model that says AWQ; where nothing is said, one whose shapes do."""
    tensors, method = module.tensors, module.settings.method
    if not tensors.keys() & {"qweight", "qzeros"}:
        return False
    if method in ("awq", "gptq"):
        return method == "awq"
    words, scales = tensors.get("qweight"), tensors.get("scales")
    return (
        words is not None
        and scales is not None
        and len(words.shape) == len(scales.shape) == 2
        and "g_idx" not in tensors
        and 8 * words.shape[1] == scales.shape[1]
    )


FORMATS = (
    Format(
        "AWQ",
        roles((r"(.+)\.(qweight|qzeros|scales|g_idx)", r"\1.weight", r"\2")),
        _claims,
        _scheme,
    ),
)
