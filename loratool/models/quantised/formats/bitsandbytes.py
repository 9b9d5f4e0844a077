"""NF4 and FP4 of bitsandbytes, with one absmax per block, nested or not.

Source: bitsandbytes/functional.py (`quantize_4bit`, `dequantize_4bit`, `QuantState.from_dict`). Its
CPU kernel for NF4 is wrong where a row is no multiple of the block; the generic one is what is
meant.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import Format, Module, json_in, roles
from loratool.models.quantised.numbers import (
    decode_pairs,
    midpoints,
    multiply_groups,
    nearest_levels,
    pair_table,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    HeldPart,
    Opened,
    Scheme,
    SnappingRows,
    read_finite,
    read_part,
    round_in_place,
)
from loratool.storage.fields import is_number, value_text
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import values_of

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
#: Dtypes that `bnb_4bit_quant_storage` may give the same bytes.
_STORAGES = ("U8", "BF16", "F16", "F32", "I8")


@dataclass(frozen=True)
class FourBit(Scheme):
    """NF4 or FP4: two codes a byte, the high one first; blocks run over the flat `[out, in]`
    matrix and may straddle rows. `quant_map[code]·absmax[block]`, in float32."""

    kind: str = "nf4"
    blocksize: int = 64
    nested_blocksize: int = 256
    nested_offset: float = 0.0
    #: What the model's own dtype was, to which the library rounds before it multiplies.
    rounded: str = "BF16"
    #: Conv1D of GPT-2 is quantised as `[out, in]`, while the plain file has `[in, out]`.
    turned: bool = False

    @property
    def title(self) -> str:
        return self.kind.upper()

    @property
    def bits(self) -> int:
        return 4

    @property
    def on_load(self) -> bool:
        return True

    @property
    def dtype(self) -> str:
        return self.rounded

    @property
    def snaps(self) -> bool:
        return not self.turned and self.columns % 2 == 0

    def opened(self, files: FilePool) -> Opened:
        return _FourBitRows(self, files)


class _FourBitRows(SnappingRows):
    def __init__(self, scheme: FourBit, files: FilePool) -> None:
        parts = scheme.parts
        self._scheme = scheme
        self._files = files
        self._codes = values_of(parts["weight"], files)
        self._itemsize = parts["weight"].itemsize
        self._absmax = _absmax(scheme, files)
        self._levels = read_finite(parts["quant_map"], files)
        self._pairs = pair_table(self._levels, high_first=True)
        self._count = math.prod(scheme.shape)
        self._held = HeldPart(parts["weight"], files)

    def rows(self, first: int, last: int, out: Floats) -> None:
        columns = self._scheme.columns
        if not self._scheme.turned:
            self._flat(first * columns, last * columns, out.reshape(-1))
            return
        # Columns of what is stored, from all of its rows.
        width = self._scheme.shape[0]
        if width % 2:
            whole = np.empty((columns, width), np.float32)
            self._flat(0, self._count, whole.reshape(-1))
            out[:] = whole[:, first:last].T
            return
        begin, end = first // 2, (last + 1) // 2
        octets = self._held.raw()[: self._count // 2].reshape(columns, width // 2)[:, begin:end]
        values = self._pairs.take(octets).view(np.float32)[:, first % 2 :][:, : last - first]
        places = np.arange(columns)[:, None] * width + np.arange(first, last)
        out[:] = (values * self._absmax.take(places // self._scheme.blocksize)).T

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        aside = copy(self)
        # Nothing is beyond the largest magnitude.
        ends = midpoints(self._levels, upper).clip(self._levels.min(), self._levels.max())
        aside._pairs = pair_table(ends, high_first=True)
        aside.rows(first, last, out)
        if self._scheme.parts["absmax"].dtype == "U8":
            aside._pairs = pair_table(np.abs(ends), high_first=True)
            aside._absmax = self._rounded_off
            off = np.empty_like(out)
            aside.rows(first, last, off)
            out += off if upper else -off

    @cached_property
    def _rounded_off(self) -> npt.NDArray[np.float32]:
        """By how much the largest magnitude of each block may be off, where it is a code itself."""
        parts, files = self._scheme.parts, self._files
        levels = read_finite(parts["nested_quant_map"], files)
        lower, upper = (
            midpoints(levels, up).clip(levels.min(), levels.max()) for up in (False, True)
        )
        gaps: npt.NDArray[np.float32] = np.maximum(upper - levels, levels - lower)
        values = gaps.take(read_part(parts["absmax"], files))
        scales = read_finite(parts["nested_absmax"], files)
        values *= np.repeat(scales, self._scheme.nested_blocksize)[: len(values)]
        return values

    def snap(self, first: int, values: Floats) -> Bytes:
        block, low = self._scheme.blocksize, first * self._scheme.columns
        begin, end = low // block, -(-(low + values.size) // block)
        scales = np.repeat(self._absmax[begin:end], block)[low - begin * block :][: values.size]
        order = np.argsort(self._levels, kind="stable").astype(np.uint8)
        flat = values.reshape(-1)
        flat /= np.where(scales == 0, np.float32(1), scales)
        codes = order.take(nearest_levels(flat, self._levels[order]))
        np.multiply(self._levels.take(codes), scales, out=flat)
        round_in_place(flat, self._scheme.dtype)
        octets: Bytes = codes[::2] << np.uint8(4) | codes[1::2]
        return octets

    def _flat(self, low: int, high: int, out: npt.NDArray[np.float32]) -> None:
        """Values `[low, high)` of the flat matrix."""
        begin, end = low - low % 2, high + high % 2  # whole bytes; there is one for an odd end
        whole = (begin, end) == (low, high)
        values = out if whole else thread_buffer("pairs", end - begin, np.float32)
        decode_pairs(self._pairs, self._bytes(begin // 2, end // 2), values)
        if not whole:
            out[:] = values[low - begin : high - begin]
        # A short block, whole ones, and a short one.
        block = self._scheme.blocksize
        first = min(-(-low // block) * block, high)
        last = max(first, high - high % block)
        for start, stop in ((low, first), (first, last), (last, high)):
            if start < stop:
                scales = self._absmax[start // block : -(-stop // block), None]
                part = out[start - low : stop - low].reshape(len(scales), -1)
                multiply_groups(part, scales, part.shape[1])

    def _bytes(self, low: int, high: int) -> npt.NDArray[np.uint8]:
        """Bytes `[low, high)` of the codes, in a buffer of this thread."""
        first, last = low // self._itemsize, -(-high // self._itemsize)
        raw = thread_buffer("codes", (last - first) * self._itemsize)
        self._codes.read_into(first, last, raw)
        held: npt.NDArray[np.uint8] = raw[low - first * self._itemsize :][: high - low]
        return held


def _absmax(scheme: FourBit, files: FilePool) -> npt.NDArray[np.float32]:
    """The largest magnitude of every block, which may be 8-bit codes themselves."""
    info = scheme.parts["absmax"]
    if info.dtype != "U8":
        return read_finite(info, files)
    scales = read_finite(scheme.parts["nested_absmax"], files)
    values = read_finite(scheme.parts["nested_quant_map"], files).take(read_part(info, files))
    values *= np.repeat(scales, scheme.nested_blocksize)[: len(values)]
    values += np.float32(scheme.nested_offset)
    return values


def _four_bit(module: Module) -> FourBit:
    states = [role for role in module.tensors if role.startswith("quant_state__")]
    if not states:
        module.refuse(f"{module.tensors['absmax'].name} is there, and its quant_state is missing")
    if len(states) > 1:
        module.refuse("it has a quant_state for NF4 and one for FP4")
    kind = states[0].rpartition("__")[2]
    title = kind.upper()
    state = json_in(module, states[0])
    weight = module.want("weight", title)
    shape, block = state.get("shape"), state.get("blocksize")
    good = isinstance(shape, list) and len(shape) in (2, 3) and all(
        type(n) is int and 0 < n < 1 << 31 for n in shape
    )  # fmt: skip
    if not good or not isinstance(shape, list):
        module.refuse(f"its quant_state has no shape of a matrix or a stack ({value_text(shape)})")
    if type(block) is not int or block < 2 or block % 2 or block > 1 << 20:
        module.refuse(f"its quant_state has no blocksize ({value_text(block)})")
    said = state.get("dtype")
    dtype = _DTYPES.get(said) if isinstance(said, str) else None
    if dtype is None:
        module.refuse(
            f"its quant_state has the dtype {value_text(said)}, expected {' or '.join(_DTYPES)}"
        )
    count = math.prod(shape)
    module.want_dtype(weight, *_STORAGES)
    if weight.nbytes != -(-count // 2 // weight.itemsize) * weight.itemsize:
        module.refuse(f"{weight} holds {2 * weight.nbytes} codes, and its shape is {shape}")
    blocks = -(-count // block)
    absmax = module.want("absmax", title)
    parts = {"weight": weight, "absmax": absmax, "quant_map": module.want("quant_map", title)}
    module.want_shape(absmax, (blocks,))
    module.want_shape(parts["quant_map"], (16,))
    module.want_dtype(parts["quant_map"], "F32")
    nested, offset = 256, 0.0
    if absmax.dtype == "U8":
        nested, offset = _nesting(module, state)
        for role, size in (("nested_absmax", -(-blocks // nested)), ("nested_quant_map", 256)):
            parts[role] = module.want(role, title)
            module.want_shape(parts[role], (size,))
            module.want_dtype(parts[role], "F32")
    else:
        module.want_dtype(absmax, "F32", "F16", "BF16")
    turned = module.is_conv1d and len(shape) == 2
    extras = module.beside(parts, states)
    plain = tuple(reversed(shape) if turned else shape)
    return FourBit(plain, parts, extras, kind, block, nested, offset, dtype, turned)


def _nesting(module: Module, state: dict[str, Any]) -> tuple[int, float]:
    """The block and the offset of an absmax that is itself in codes."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or not 0 < block <= 1 << 20:
        module.refuse(f"its quant_state has no nested_blocksize ({value_text(block)})")
    if not isinstance(offset, int | float) or not is_number(offset):
        module.refuse(f"its quant_state has no nested_offset ({value_text(offset)})")
    return block, float(offset)


FORMATS = (
    Format(
        "bitsandbytes 4 bit",
        roles(
            (r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map)", r"\1", r"\2"),
            (r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)", r"\1", r"quant_state__\2"),
        ),
        lambda module: (
            any(role.startswith("quant_state__") for role in module.tensors)
            or "absmax" in module.tensors
        ),
        _four_bit,
        descriptions=("quant_state__nf4", "quant_state__fp4"),
    ),
)
