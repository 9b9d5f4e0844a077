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
from loratool.models.quantised.grid import Grid, GridScales, fitting_grid
from loratool.models.quantised.module import Format, Module, roles
from loratool.models.quantised.numbers import (
    E4M3_ENDS,
    decode_e4m3,
    decode_integers,
    ends_of_codes,
    has_e4m3_nan,
    integers_as_float32,
    multiply_groups,
    subtract_groups,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    Opened,
    Scheme,
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
    def blur(self) -> float:
        return blur_of_sums(8) if "zero" in self.parts else 0.0

    def opened(self, files: FilePool) -> Opened:
        return _ScaledRows(self, files)


class _ScaledRows(Opened):
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
        self._highest = float(np.finfo(np.float32).max) / _LARGEST[self._main.dtype]

    def rows(self, first: int, last: int, out: Floats) -> None:
        codes = self._read(first, last)
        if self._main.dtype == "I8":
            decode_integers(codes.view(np.int8), out.reshape(-1))
        else:
            if has_e4m3_nan(codes):
                raise broken_part(self._main, "it holds NaN")
            decode_e4m3(codes, out.reshape(-1))
        scales = self._scale_rows(first, last, out)
        if np.abs(scales).max() > self._highest and not np.isfinite(out).all():
            raise broken_part(self._scale, "it makes numbers that float32 cannot hold")

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        codes = self._read(first, last)
        if self._main.dtype == "I8":
            decode_integers(codes.view(np.int8), out.reshape(-1))
            ends_of_codes(out, upper, -128, 127)
        else:
            E4M3_ENDS[upper].take(codes, out=out.reshape(-1), mode="clip")
        self._scale_rows(first, last, out)

    def _read(self, first: int, last: int) -> Bytes:
        """The codes of these rows, in a buffer of this thread."""
        columns = self._scheme.columns
        codes: Bytes = thread_buffer("codes", (last - first) * columns)
        self._codes.read_into(first * columns, last * columns, codes)
        return codes

    def _scale_rows(self, first: int, last: int, out: Floats) -> Floats:
        """`(code − zero)·scale`, in place; the scales of each row."""
        group = self._scheme.grid.block[1]
        if self._zeros is not None:
            subtract_groups(out, self._zeros.of_rows(first, last), group)
        scales = self._scales.of_rows(first, last)
        multiply_groups(out, scales, group)
        return scales


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
            "Merge into the unquantised model that it was made from.",
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
        return True
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
            "Merge into the unquantised model that it was made from.",
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
    if not blocks:
        blocks.append((128, 128))
    if scale.dtype in _POWERS:
        blocks.append((1, 32))
    return fitting_grid(module, weight.shape, scale, blocks, whole)


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
