"""bitsandbytes: NF4 and FP4 with one absmax per block, nested or not; int8 with one per row.

Source: bitsandbytes/functional.py (`quantize_4bit`, `dequantize_4bit`, `QuantState.from_dict`),
bitsandbytes/nn/modules.py (`Linear8bitLt._save_to_state_dict`). Its CPU kernel for NF4 is wrong
where a row is no multiple of the block; the generic one is what is meant.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from loratool.models.layouts.names import CONV1D
from loratool.models.quantised.module import Format, Module, json_in, roles
from loratool.models.quantised.numbers import (
    decode_pairs,
    multiply_groups,
    pair_table,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    Opened,
    Scheme,
    broken_part,
    read_part,
)
from loratool.storage.tensors import FilePool, as_float32
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

    def opened(self, files: FilePool) -> Opened:
        return _FourBitRows(self, files)


class _FourBitRows(Opened):
    def __init__(self, scheme: FourBit, files: FilePool) -> None:
        parts = scheme.parts
        self._scheme = scheme
        self._codes = values_of(parts["weight"], files)
        self._itemsize = parts["weight"].itemsize
        self._map = read_part(parts["quant_map"], files).view(np.float32)
        self._absmax = _absmax(scheme, files)
        for role in ("absmax", "quant_map"):
            values = self._absmax if role == "absmax" else self._map
            if not np.isfinite(values).all():
                raise broken_part(parts[role], "it holds NaN or infinity")
        self._pairs = pair_table(self._map, high_first=True)
        self._count = math.prod(scheme.shape)

    def rows(self, first: int, last: int, out: Floats) -> None:
        columns = self._scheme.columns
        if self._scheme.turned:
            self._turned(first, last, out)
        else:
            self._flat(first * columns, last * columns, out.reshape(-1))

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

    def _turned(self, first: int, last: int, out: Floats) -> None:
        """Columns of what is stored, gathered from all of its rows."""
        height, width = self._scheme.shape
        places = np.arange(width) * height + np.arange(first, last)[:, None]
        codes = self._held.take(places >> 1)
        codes >>= ((~places & 1) << 2).astype(np.uint8)
        codes &= np.uint8(15)
        self._map.take(codes, out=out, mode="clip")
        places //= self._scheme.blocksize
        out *= self._absmax.take(places)

    @cached_property
    def _held(self) -> npt.NDArray[np.uint8]:
        """All codes, where rows of the weight lie all over them."""
        return self._bytes(0, -(-self._count // 2)).copy()

    def _bytes(self, low: int, high: int) -> npt.NDArray[np.uint8]:
        """Bytes `[low, high)` of the codes, in a buffer of this thread."""
        first, last = low // self._itemsize, -(-high // self._itemsize)
        raw = thread_buffer("codes", (last - first) * self._itemsize)
        self._codes.read_into(first, last, raw)
        return raw[low - first * self._itemsize : high - first * self._itemsize]


def _absmax(scheme: FourBit, files: FilePool) -> npt.NDArray[np.float32]:
    """The largest magnitude of every block, which may be 8-bit codes themselves."""
    info = scheme.parts["absmax"]
    raw = read_part(info, files)
    if info.dtype != "U8":
        return as_float32(raw, info.dtype)
    codes = read_part(scheme.parts["nested_quant_map"], files).view(np.float32)
    scales = read_part(scheme.parts["nested_absmax"], files).view(np.float32)
    values = codes.take(raw)
    values *= np.repeat(scales, scheme.nested_blocksize)[: len(values)]
    values += np.float32(scheme.nested_offset)
    return values


def _four_bit(module: Module) -> FourBit:
    state_role = next((r for r in module.tensors if r.startswith("quant_state__")), None)
    if state_role is None:
        module.refuse(f"{module.tensors['absmax'].name} is there, and its quant_state is missing")
    kind = state_role.rpartition("__")[2]
    title = kind.upper()
    state = json_in(module, state_role)
    weight = module.want("weight", title)
    shape, block = state.get("shape"), state.get("blocksize")
    good = isinstance(shape, list) and len(shape) == 2 and all(
        type(n) is int and 0 < n < 1 << 31 for n in shape
    )  # fmt: skip
    if not good or not isinstance(shape, list):
        module.refuse(f"its quant_state has no shape of two sizes ({shape!r:.80})")
    if type(block) is not int or block < 2 or block % 2 or block > 1 << 20:
        module.refuse(f"its quant_state has no blocksize ({block!r:.80})")
    dtype = _DTYPES.get(str(state.get("dtype")))
    if dtype is None:
        module.refuse(f"its quant_state has the dtype {state.get('dtype')!r:.80}")
    out, width = shape
    module.want_dtype(weight, *_STORAGES)
    if weight.nbytes != -(-(out * width) // 2 // weight.itemsize) * weight.itemsize:
        module.refuse(f"{weight} holds {2 * weight.nbytes} codes, and its shape is {shape}")
    blocks = -(-out * width // block)
    absmax = module.want("absmax", title)
    parts = {"weight": weight, "absmax": absmax, "quant_map": module.want("quant_map", title)}
    module.want_shape(absmax, (blocks,))
    module.want_shape(parts["quant_map"], (16,))
    module.want_dtype(parts["quant_map"], "F32")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset", 0.0)
    if absmax.dtype == "U8":
        if type(nested) is not int or not 0 < nested <= 1 << 20:
            module.refuse(f"its quant_state has no nested_blocksize ({nested!r:.80})")
        if type(offset) not in (int, float) or not math.isfinite(offset):
            module.refuse(f"its quant_state has no nested_offset ({offset!r:.80})")
        for role, size in (("nested_absmax", -(-blocks // nested)), ("nested_quant_map", 256)):
            parts[role] = module.want(role, title)
            module.want_shape(parts[role], (size,))
            module.want_dtype(parts[role], "F32")
    else:
        module.want_dtype(absmax, "F32", "F16", "BF16")
    turned = _is_conv1d(module)
    extras = tuple(t for r, t in module.tensors.items() if r not in parts)
    return FourBit(
        (width, out) if turned else (out, width), parts, extras, kind, block,
        nested if type(nested) is int else 256, float(offset), dtype, turned,
    )  # fmt: skip


def _is_conv1d(module: Module) -> bool:
    pattern = CONV1D.get(module.base.model_type)
    return pattern is not None and re.search(pattern, module.path) is not None


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
