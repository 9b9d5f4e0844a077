"""Numbers of 8 bits times scales: FP8 (E4M3) per tensor, row, block or group, MXFP8, and INT8.

Sources: transformers/integrations/finegrained_fp8.py (`weight_scale_inv`, which multiplies in spite
of its name; stacks of experts) and fbgemm_fp8.py; compressed_tensors/compressors (float-quantized,
int-quantized, mxfp8-quantized); modelopt/torch/export (`fp8_pb_wo`: scales of four dimensions).
transformers derives blocks from the number of scales, which is wrong where the last one is short.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loratool.models.quantised.arguments import weight_arguments
from loratool.models.quantised.grid import Grid, GridScales, fitting_grid, refuse_overflow
from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import (
    E4M3_ENDS,
    add_groups,
    decode_e4m3,
    decode_integers,
    divide_groups,
    encode_e4m3,
    encode_integers,
    has_e4m3_nan,
    integers_as_float32,
    multiply_groups,
    subtract_groups,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    OnGrid,
    Scheme,
    SnappingRows,
    blur_of_sums,
    broken_part,
)
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import values_of

#: Roles of scales in the order in which they are looked for; the last two are of names that other
#: tensors may have, too.
_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale_inv", "scale")
#: Scales beside a weight that say it is quantised, whatever it is.
_PLAINLY = frozenset(_SCALES[:3])
_FLOATS = ("F32", "BF16", "F16")
_POWERS = ("F8_E8M0", "U8")
#: The largest magnitudes of codes.
_LARGEST = {"F8_E4M3": 448, "I8": 256}
_OTHER_FLOATS = {
    "F8_E5M2": "float8 e5m2", "F8_E4M3FNUZ": "float8 e4m3fnuz", "F8_E5M2FNUZ": "float8 e5m2fnuz",
    "F8_E8M0": "float8 e8m0",
}  # fmt: skip


@dataclass(frozen=True)
class Scaled(Scheme):
    """`code·scale`, or `(code − zero)·scale` where there are zero points, in float32: codes are
    numbers of 8 bits, scales and zero points are of the blocks of a grid."""

    grid: Grid = field(kw_only=True)

    @property
    def title(self) -> str:
        rows, columns = self.grid.block
        powers = self.parts["scale"].dtype in _POWERS
        kind = "INT8" if self.main.dtype == "I8" else "FP8"
        if (rows, columns) == (1, 32) and powers and kind == "FP8":
            return "MXFP8"
        if rows == 1:
            whole = columns >= self.grid.columns
            return f"{kind} per channel" if whole else f"{kind} in groups of {columns}"
        if (rows, columns) == (self.grid.height, self.grid.columns):
            return f"{kind} per tensor"
        return f"{kind} in blocks of {rows}×{columns}"

    @property
    def bits(self) -> int:
        return 8

    @property
    def snaps(self) -> bool:
        return True

    @property
    def blur(self) -> float:
        return blur_of_sums(8) if "zero" in self.parts else 0.0

    def opened(self, files: FilePool) -> OnGrid:
        return _ScaledRows(self, files)


class _ScaledRows(OnGrid, SnappingRows):
    def __init__(self, scheme: Scaled, files: FilePool) -> None:
        self._scheme = scheme
        self._main = scheme.main
        self._scale = scheme.parts["scale"]
        self._codes = values_of(self._main, files)
        self._scales = GridScales(self._scale, scheme.grid, files)
        zero = scheme.parts.get("zero")
        self._zeros = (
            None if zero is None else GridScales(zero, scheme.grid, files, integers_as_float32)
        )

    def rows(self, first: int, last: int, out: Floats) -> None:
        columns = self._scheme.columns
        codes = thread_buffer("codes", (last - first) * columns)
        self._codes.read_into(first * columns, last * columns, codes)
        if self._main.dtype == "I8":
            decode_integers(codes.view(np.int8), out.reshape(-1))
        else:
            if has_e4m3_nan(codes):
                raise broken_part(self._main, "it holds NaN")
            decode_e4m3(codes, out.reshape(-1))
        scales, zeros, group = self.grid(first, last)
        if zeros is not None:
            subtract_groups(out, zeros, group)
        multiply_groups(out, scales, group)
        refuse_overflow(out, scales, _LARGEST[self._main.dtype], self._scale)

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        if self._main.dtype == "I8":
            super().ends(first, last, out, upper)
            return
        columns = self._scheme.columns
        codes = thread_buffer("codes", (last - first) * columns)
        self._codes.read_into(first * columns, last * columns, codes)
        E4M3_ENDS[upper].take(codes, out=out.reshape(-1), mode="clip")
        scales, _, group = self.grid(first, last)
        multiply_groups(out, scales, group)

    def grid(self, first: int, last: int) -> tuple[Floats, Floats | None, int]:
        zeros = None if self._zeros is None else self._zeros.of_rows(first, last)
        return self._scales.of_rows(first, last), zeros, self._scheme.grid.block[1]

    def snap(self, first: int, values: Floats) -> Bytes:
        flat = values.reshape(-1)
        scales, zeros, group = self.grid(first, first + len(values))
        divide_groups(values, scales, group)
        if self._main.dtype == "I8":
            if zeros is not None:
                add_groups(values, zeros, group)
            codes = encode_integers(flat, -128, 127).view(np.uint8)
            decode_integers(codes.view(np.int8), flat)
        else:
            codes = encode_e4m3(flat)
            decode_e4m3(codes, flat)
        if zeros is not None:
            subtract_groups(values, zeros, group)
        multiply_groups(values, scales, group)
        return codes


def scaled(
    module: Module,
    weight: TensorInfo,
    scale: TensorInfo,
    grid: Grid,
    zero: TensorInfo | None = None,
    extras: tuple[TensorInfo, ...] = (),
) -> Scaled:
    """The scheme of a weight of codes of 8 bits and the scales of a grid."""
    if weight.dtype in _OTHER_FLOATS:
        module.refuse(
            f"{weight.name} is {_OTHER_FLOATS[weight.dtype]}, and only e4m3fn is read",
            UNQUANTISED,
        )
    module.want_dtype(weight, *_LARGEST)
    powers = _POWERS if weight.dtype == "F8_E4M3" else ()
    module.want_dtype(scale, *_FLOATS, *powers)
    parts = {"weight": weight, "scale": scale}
    if zero is not None:
        module.want_dtype(zero, "I8", "I32")
        parts["zero"] = zero
    return Scaled(weight.shape, parts, extras, grid=grid)


def _claims(module: Module) -> bool:
    weight = module.tensors.get("weight")
    if weight is not None and weight.dtype.startswith("F8_"):
        # A vector without a scale is a table of some sort, and copied.
        return len(weight.shape) > 1 or weight.name.endswith(".weight") or len(module.tensors) > 1
    if weight is None or weight.is_float:
        return bool(_PLAINLY & module.tensors.keys())
    return weight.dtype == "I8" and any(role in module.tensors for role in _SCALES)


def _scheme(module: Module) -> Scaled:
    found = [role for role in _SCALES if role in module.tensors]
    weight = module.tensors.get("weight")
    if weight is None:
        module.refuse(f"{module.tensors[found[0]].name} is there, and the weight of it is missing")
    if weight.is_float:
        scale = module.tensors[found[0]]
        module.refuse(
            f"{weight} is plain, and {scale} beside it is the scale of a quantised one",
            UNQUANTISED,
        )
    if not found:
        others = sorted(info.name for role, info in module.tensors.items() if role != "weight")
        there = f" (there is {', '.join(others)})" if others else ""
        module.refuse(f"{weight.name} is stored in FP8 and its scale is missing{there}")
    if len(weight.shape) not in (2, 3):
        module.refuse(f"{weight} is no matrix and no stack of matrices")
    scale = module.tensors[found[0]]
    zero = module.tensors.get("weight_zero_point") if weight.dtype == "I8" else None
    extras = module.beside(
        {"weight": weight, found[0]: scale, **({"weight_zero_point": zero} if zero else {})}
    )
    if zero is not None:
        module.want_shape(zero, scale.shape)
    return scaled(module, weight, scale, _grid(module, weight, scale), zero, extras)


def _grid(module: Module, weight: TensorInfo, scale: TensorInfo) -> Grid:
    *stack, rows, columns = weight.shape
    if module.settings.method == "fbgemm-fp8" and stack:
        # Stored [experts, in, out], with a scale for each column.
        module.want_shape(scale, (*stack, 1, columns), (*stack, columns, 1))
        return Grid(rows, columns, (rows, 1))
    said = weight_arguments(module)
    blocks = [one.block for one in said if one.block]
    blocks += [(1, one.group) for one in said if one.group]
    # An embedding has one scale, in whatever blocks the linear layers are.
    embedding = scale.name.endswith(".weight_scale") and scale.shape in ((), (1,))
    whole = len(blocks) < len(said) or not said or embedding
    usual = [] if blocks else [(128, 128)]
    if scale.dtype in _POWERS:
        usual.append((1, 32))
    return fitting_grid(module, weight.shape, scale, blocks, usual, whole)


FORMATS = (
    Format(
        "FP8 and INT8 with scales",
        roles(
            (r"(.+)\.(weight_scale_inv|weight_scale|qscale_weight|scale)", r"\1.weight", r"\2"),
            (r"(.+)\.(weight_zero_point|pre_quant_scale)", r"\1.weight", r"\2"),
            (r"(.+\.\w+)_(scale_inv|scale)", r"\1", r"\2"),
        ),
        _claims,
        _scheme,
    ),
)
