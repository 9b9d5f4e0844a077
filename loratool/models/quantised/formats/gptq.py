"""GPTQ: codes of 2, 3, 4 or 8 bits along the inputs, with a scale and a zero for groups of these.

Source: gptqmodel/nn_modules/qlinear/__init__.py (`pack`, `dequantize_weight`) and
gptqmodel/utils/model.py (`convert_gptq_v1_to_v2_format_module`). Files of the first version have
every zero less one, taken from whole words of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import (
    decode_words,
    multiply_groups,
    subtract_groups,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    HeldPart,
    OnGrid,
    Scheme,
    broken_part,
    read_finite,
    read_part,
)
from loratool.storage.fields import value_text
from loratool.storage.tensors import FilePool, TensorInfo

#: What is added to a word of zeros of the first version, which has them all less one.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq(Scheme):
    """Codes `[in·bits/32, out]` in words, `(code − zero)·scale` with those of the input's group."""

    width: int = 4
    #: Inputs of a group, in order; 0 where `g_idx` says the group of each.
    group: int = 0
    #: Whether zeros are stored as they are.
    second: bool = False
    #: Conv1D of GPT-2: the plain file has `[in, out]`.
    turned: bool = False

    @property
    def title(self) -> str:
        return f"GPTQ {self.width} bit"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def is_nearest(self) -> bool:
        return False

    def opened(self, files: FilePool) -> OnGrid:
        return _Rows(self, files)


class _Rows(OnGrid):
    def __init__(self, scheme: Gptq, files: FilePool) -> None:
        parts = scheme.parts
        self._scheme = scheme
        self._words = HeldPart(parts["qweight"], files)
        self._stored = parts["qweight"].shape
        self._inputs = scheme.shape[0] if scheme.turned else scheme.columns
        scales = read_finite(parts["scales"], files, times=1 << scheme.width)
        self._scales = np.ascontiguousarray(scales.T)
        self._zeros = np.ascontiguousarray(_zeros(scheme, files)[:, : scales.shape[1]].T)
        self._group, self._index = scheme.group, None
        if not scheme.group:
            self._index = _groups(parts["g_idx"], len(scales), files)
            first = max(1, int(np.count_nonzero(self._index == 0)))
            if np.array_equal(self._index, np.arange(self._inputs) // first):
                self._group = first

    def rows(self, first: int, last: int, out: Floats) -> None:
        if not self._scheme.turned:
            self._fill(out, slice(first, last), 0)
            return
        # Inputs of all outputs, from a whole number of words on: 32 codes are in all of them.
        low, high = first - first % 32, min(self._inputs, -(-last // 32) * 32)
        values = np.empty((out.shape[1], high - low), np.float32)
        self._fill(values, slice(None), low)
        out[:] = values[:, first - low : last - low].T

    def _fill(self, out: Floats, outputs: slice, low: int) -> None:
        """Values of these outputs, `[outputs, inputs]`, from input `low` on."""
        bits, count = self._scheme.width, out.shape[1]
        end = -(-(low + count) * bits // 32)
        held = self._words.raw().view("<i4").reshape(self._stored)
        words = np.ascontiguousarray(held[low * bits // 32 : end, outputs].T)
        codes = words.shape[1] * 32 // bits
        values = out
        if codes != count:
            values = thread_buffer("codes", len(out) * codes, np.float32).reshape(-1, codes)
        decode_words(words, bits, values)
        if values is not out:
            out[:] = values[:, :count]
        zeros, scales, group = self._zeros[outputs], self._scales[outputs], self._group
        if group and low % group == 0:
            chosen = slice(low // group, -(-(low + count) // group))
            subtract_groups(out, zeros[:, chosen], group)
            multiply_groups(out, scales[:, chosen], group)
            return
        index = np.arange(self._inputs) // group if self._index is None else self._index
        own = index[low : low + count]
        for some, step in ((zeros, np.subtract), (scales, np.multiply)):
            spread = thread_buffer("of each input", out.size, np.float32).reshape(out.shape)
            some.take(own, axis=1, out=spread, mode="clip")
            step(out, spread, out=out)

    def grid(self, first: int, last: int) -> tuple[Floats, Floats | None, int]:
        if not self._scheme.turned and self._group:
            return self._scales[first:last], self._zeros[first:last], self._group
        index = np.arange(self._inputs) // self._group if self._index is None else self._index
        if self._scheme.turned:
            scales, zeros = (some.T.take(index[first:last], 0) for some in self._both)
        else:
            scales, zeros = (some[first:last].take(index, 1) for some in self._both)
        return scales, zeros, 1

    @property
    def _both(self) -> tuple[Floats, Floats]:
        return self._scales, self._zeros


def _zeros(scheme: Gptq, files: FilePool) -> Floats:
    """The zeros, `[groups, outputs or more]`."""
    info, bits = scheme.parts["qzeros"], scheme.width
    words: npt.NDArray[Any] = read_part(info, files).view("<u4").reshape(info.shape)
    if not scheme.second and bits in _ONES:
        words = words + np.uint32(_ONES[bits])  # with what is carried over, as it was taken away
    found = np.empty((len(words), words.shape[1] * 32 // bits), np.float32)
    decode_words(words, bits, found)
    if not scheme.second and bits not in _ONES:
        found = (found + 1) % (1 << bits)
    return found


def _groups(info: TensorInfo, groups: int, files: FilePool) -> npt.NDArray[np.int64]:
    """The group of each input."""
    raw = read_part(info, files)
    index = raw.view("<i8" if info.dtype == "I64" else "<i4").astype(np.int64)
    if index.min() < 0 or index.max() >= groups:
        wrong = int(index.min() if index.min() < 0 else index.max())
        raise broken_part(info, f"it names group {wrong} of {groups}")
    return index


def _scheme(module: Module) -> Gptq:
    table = module.settings.table
    if module.settings.method != "gptq":
        said = f"says {module.settings.method}" if module.settings.method else "does not say so"
        module.refuse(
            f"its tensors, such as {next(iter(module.tensors.values())).name}, are packed as GPTQ "
            f"packs them, and config.json {said}",
            "Which version of GPTQ they are of stands only in quantization_config: bring back the "
            "one that they were published with.",
        )
    words, zeros, scales = (module.want(role, "GPTQ") for role in ("qweight", "qzeros", "scales"))
    packed = table.get("pack_dtype")
    if packed not in (None, "int32"):
        module.refuse(
            f"its codes are packed into {value_text(packed)} (pack_dtype), expected int32"
        )
    for info in (words, zeros):
        module.want_dtype(info, "I32")
    module.want_dtype(scales, "F16", "BF16", "F32")
    for info in (words, zeros, scales):
        if len(info.shape) != 2 or not info.numel:
            module.refuse(f"{info} is no matrix")
    groups, outputs = scales.shape
    index = module.tensors.get("g_idx")
    inputs = None
    if index is not None:
        module.want_dtype(index, "I32", "I64")
        if len(index.shape) != 1 or not index.numel:
            module.refuse(f"{index} is no list of groups")
        inputs = index.numel
    bits = _bits(module, words, zeros, outputs, inputs)
    module.want_shape(words, (words.shape[0], outputs))
    module.want_shape(zeros, (groups, -(-outputs * bits // 32)))
    inputs = inputs or words.shape[0] * 32 // bits
    if bits == 3 and (words.shape[0] % 3 or zeros.shape[1] % 3):
        module.refuse(
            f"{words} and {zeros} have 3-bit codes, 32 in three words, and words left over"
        )
    group = 0 if index is not None else _group(module, inputs, groups)
    parts = {"qweight": words, "qzeros": zeros, "scales": scales}
    if index is not None:
        parts["g_idx"] = index
    turned = module.is_conv1d
    shape = (inputs, outputs) if turned else (outputs, inputs)
    return Gptq(shape, parts, module.beside(parts), bits, group, _is_second(module), turned)


def _is_second(module: Module) -> bool:
    """Whether zeros are stored as they are."""
    table = module.settings.table
    said = {str(table[k]).lower() for k in ("checkpoint_format", "format") if table.get(k)}
    if said and said not in ({"gptq"}, {"gptq_v2"}):
        module.refuse(
            f"its format is {' and '.join(sorted(said)):.80}, expected gptq or gptq_v2",
            UNQUANTISED,
        )
    return said == {"gptq_v2"}


def _bits(
    module: Module, words: TensorInfo, zeros: TensorInfo, outputs: int, inputs: int | None
) -> int:
    """How many bits a code has: what the config says, where the shapes allow it, or, where rules
    (`dynamic`) may say otherwise for a module, what alone they allow."""
    table = module.settings.table
    said = table.get("bits")
    fitting = [
        bits
        for bits in _BITS
        if zeros.shape[1] == -(-outputs * bits // 32)
        and (inputs is None or words.shape[0] == -(-inputs * bits // 32))
    ]
    if type(said) is int and said in fitting:
        return said
    if type(said) is int and said not in _BITS:
        module.refuse(f"its codes have {value_text(said)} bits, expected 2, 3, 4 or 8")
    if len(fitting) != 1 or not (said is None or table.get("dynamic")):
        module.refuse(
            f"the shapes of {words} and {zeros}, for {outputs} outputs, do not fit codes of "
            f"{value_text(said)} bits"
        )
    return fitting[0]


def _group(module: Module, inputs: int, groups: int) -> int:
    """Inputs of a group, where the groups follow each other."""
    table = module.settings.table
    if groups == 1:
        return inputs
    if table.get("desc_act"):
        module.refuse("its inputs are sorted into groups (desc_act) and its g_idx is missing")
    said = table.get("group_size")
    if type(said) is int and said > 0 and -(-inputs // said) == groups:
        return said
    if inputs % groups or not (said is None or table.get("dynamic")):
        module.refuse(
            f"it has {groups} groups for {inputs} inputs, and group_size is {value_text(said)}"
        )
    return inputs // groups


FORMATS = (
    Format(
        "GPTQ",
        roles((r"(.+)\.(qweight|qzeros|scales|g_idx)", r"\1.weight", r"\2")),
        lambda module: bool(module.tensors.keys() & {"qweight", "qzeros", "g_idx"}),
        _scheme,
    ),
)
