"""HQQ: codes of 1 to 8 bits, part over part in a byte, and what tells how, a small tensor for each.

Source: hqq/core/quantize.py (`Quantizer.dequantize`, `HQQLinear.state_dict`), hqq/core/bitpack.py.
The weight is seen as `[R, C]`, with a zero and a scale for each row (axis 1, `C` is the group) or
each column (axis 0). Rows are packed part over part: with four bits the first half of the rows is
in the high bits. The library computes in a dtype of its own and rounds twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.module import Format, Module, roles
from loratool.models.quantised.scheme import Floats, Opened, Scheme, read_finite, round_in_place
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import values_of

#: How codes are packed: bits of one, and bytes of what they are packed into.
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 1), "3bit_32": (3, 4), "2bit_u8": (2, 1),
             "1bit_u8": (1, 1)}  # fmt: skip
#: How many codes that holds. Of the ten in 32 bits the first is below the two highest bits.
_CODES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
#: The small tensors that tell how.
_TELLING = (
    "shape", "axis", "compute_dtype", "packing", "view_as_float", "quant_scale",
    "quant_zero",
)  # fmt: skip
#: Those that say how it was made, and are not needed any more.
_TOLD = (
    "nbits", "group_size", "unpack_view_dtype", "channel_wise", "optimize", "round_zero",
    "offload_meta", "encoded_state_dict", "stores_quant_config",
)  # fmt: skip
#: In their place, where zeros and scales are in codes themselves, or lie in one tensor.
_QUANTISED_TOO = ("zero_q", "scale_q", "meta_zero", "meta_scale", "zero_scale", "meta")


@dataclass(frozen=True)
class Hqq(Scheme):
    """`(code − zero)·scale`, both steps rounded to `rounded`."""

    width: int = 4
    #: Bytes that codes are packed into, and `C` of the `[R, C]` that the weight is seen as.
    itemsize: int = 1
    run: int = 64
    axis: int = 1
    rounded: str = "BF16"

    @property
    def title(self) -> str:
        return f"HQQ {self.width} bit"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def dtype(self) -> str:
        return self.rounded

    @property
    def is_nearest(self) -> bool:
        # Zeros are moved until the weights as a whole are near, and some are cut off.
        return False

    def opened(self, files: FilePool) -> Opened:
        return _Rows(self, files)


class _Rows(Opened):
    def __init__(self, scheme: Hqq, files: FilePool) -> None:
        parts = scheme.parts
        self._scheme = scheme
        self._packed = values_of(parts["W_q"], files)
        #: Items that codes are packed into.
        self._items = parts["W_q"].nbytes // scheme.itemsize
        self._zeros, self._scales = (
            _rounded(read_finite(parts[role], files), scheme.rounded) for role in ("zero", "scale")
        )

    def rows(self, first: int, last: int, out: Floats) -> None:
        values = out.reshape(-1)
        low, high = first * self._scheme.columns, last * self._scheme.columns
        bits, items = self._scheme.width, self._items
        at = low
        while at < high:
            part = at // items
            end = min(high, (part + 1) * items)
            codes = self._read(at - part * items, end - part * items)
            shift = bits * (_CODES[bits] - 1 - part)
            values[at - low : end - low] = (codes >> shift) & ((1 << bits) - 1)
            at = end
        values -= self._spread(self._zeros, low, high)
        round_in_place(values, self._scheme.rounded)
        values *= self._spread(self._scales, low, high)  # rounded with the values themselves

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        self.rows(first, last, out)
        low, high = first * self._scheme.columns, last * self._scheme.columns
        values = out.reshape(-1)
        values += self._spread(self._scales, low, high) * np.float32(0.5 if upper else -0.5)

    def _read(self, low: int, high: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint32]:
        """Items `[low, high)`, which may lie in the file as other numbers of the same bytes."""
        size, stored = self._scheme.itemsize, self._packed.info.itemsize
        first, last = low * size // stored, -(-high * size // stored)
        raw: Bytes = self._packed.bytes(first, last)
        raw = raw[low * size - first * stored :][: (high - low) * size]
        return raw if size == 1 else np.ascontiguousarray(raw).view("<u4")

    def _spread(self, some: Floats, low: int, high: int) -> Floats:
        """Zeros or scales of values `[low, high)`, one for each."""
        run, count = self._scheme.run, high - low
        if some.size == 1:
            return some
        if self._scheme.axis == 1:
            begin, end = low // run, -(-high // run)
            counts = np.full(end - begin, run)
            counts[0] -= low - begin * run
            counts[-1] -= end * run - high
            return np.repeat(some[begin:end], counts)
        start = low % run
        if start + count <= run:
            return some[start : start + count]
        whole, rest = divmod(count - (run - start), run)
        return np.concatenate([some[start:], np.tile(some, whole), some[:rest]])


def _rounded(values: Floats, dtype: str) -> Floats:
    """Zeros or scales as the library has them once they are loaded, flat."""
    round_in_place(values, dtype)
    return values.reshape(-1)


def _scheme(module: Module) -> Hqq:
    packed = module.want("W_q", "HQQ")
    other = [role for role in _QUANTISED_TOO if role in module.tensors]
    if other or _flag(module, "quant_zero") or _flag(module, "quant_scale"):
        module.refuse(
            "its zeros or scales are quantised themselves, or lie in one tensor"
            + (f" ({', '.join(other)})" if other else ""),
            "Quantise the model again with a newer HQQ, which writes them plain.",
        )
    bits, itemsize = _packing(module)
    shape = _numbers(module, "shape", "I64")
    if len(shape) != 2 or not all(0 < n < 1 << 31 for n in shape):
        module.refuse(f"its shape is {shape}, expected two sizes")
    (axis,) = _numbers(module, "axis", "I32", "I64")
    if axis not in (0, 1):
        module.refuse(f"its axis is {axis}, expected 0 or 1")
    dtype = _DTYPES.get(_text(module, "compute_dtype").removeprefix("torch."))
    if dtype is None:
        module.refuse(
            f"its compute_dtype is {_text(module, 'compute_dtype')!r:.80}, expected "
            + " or ".join(_DTYPES)
        )
    if len(packed.shape) != 2 or not packed.numel:
        module.refuse(f"{packed} is no matrix")
    if _flag(module, "view_as_float"):
        module.want_dtype(packed, "F16", "BF16", "F32")
    else:
        module.want_dtype(packed, *(("U8",) if itemsize == 1 else ("I32",)))
    run = packed.shape[1] * packed.itemsize // itemsize
    rows, rest = divmod(shape[0] * shape[1], run) if run else (0, 1)
    held = packed.shape[0] * _CODES[bits]
    # Only the last of ten parts may be longer than what is left for it.
    if rest or (held != rows if bits != 3 else not held - 10 < rows <= held):
        module.refuse(
            f"{packed} holds {held} x {run} codes of {bits} bits, and its shape is {shape}"
        )
    parts = {"W_q": packed}
    for role in ("zero", "scale"):
        parts[role] = module.want(role, "HQQ")
        module.want_dtype(parts[role], "F16", "BF16", "F32")
        module.want_shape(parts[role], (rows, 1) if axis == 1 else (1, run), (), (1,), (1, 1))
    extras = module.beside(parts, (*_TELLING, *_TOLD))
    return Hqq((shape[0], shape[1]), parts, extras, bits, itemsize, run, axis, dtype)


def _packing(module: Module) -> tuple[int, int]:
    """Bits of a code and bytes of what it is packed into."""
    name = _text(module, "packing")
    if name not in _PACKINGS:
        module.refuse(f"its packing is {name!r:.80}, expected {' or '.join(_PACKINGS)}")
    return _PACKINGS[name]


def _flag(module: Module, role: str) -> bool:
    return role in module.tensors and any(module.described[role])


def _text(module: Module, role: str) -> str:
    module.want_dtype(module.want(role, "HQQ"), "U8")
    return module.described[role].decode("latin-1")


def _numbers(module: Module, role: str, *dtypes: str) -> list[int]:
    info = module.want(role, "HQQ")
    module.want_dtype(info, *dtypes)
    if info.numel > 2 or not info.numel:
        module.refuse(f"{info} is no number")
    raw = np.frombuffer(module.described[role], "<i8" if info.dtype == "I64" else "<i4")
    return [int(number) for number in raw]


FORMATS = (
    Format(
        "HQQ",
        roles(
            (
                rf"(.+)\.(W_q|zero|scale|{'|'.join((*_TELLING, *_TOLD, *_QUANTISED_TOO))})",
                r"\1.weight",
                r"\2",
            )
        ),
        lambda module: (
            "W_q" in module.tensors or module.tensors.keys() >= {"nbits", "zero", "scale"}
        ),
        _scheme,
        descriptions=_TELLING,
    ),
)
