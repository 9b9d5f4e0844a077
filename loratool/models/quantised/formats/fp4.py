"""FP4 (E2M1) codes times scales of groups: NVFP4, MXFP4, and the experts of gpt-oss.

Sources: compressed_tensors/compressors (nvfp4-pack-quantized, mxfp4-pack-quantized),
modelopt/torch/quantization/qtensor/nvfp4_tensor.py, transformers/integrations/mxfp4.py (gpt-oss)
and finegrained_fp8.py (`expert_dtype="fp4"`, DeepSeek V4).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.arguments import weight_arguments
from loratool.models.quantised.encoding.rounding import to_e2m1
from loratool.models.quantised.grid import Grid, GridScales, fitting_grid, refuse_overflow
from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import (
    E2M1,
    E8M0,
    decode_columns,
    decode_pairs,
    divide_groups,
    midpoints,
    multiply_groups,
    pair_table,
    thread_buffer,
)
from loratool.models.quantised.scheme import (
    Floats,
    Opened,
    Scheme,
    SnappingRows,
    broken_part,
    read_part,
)
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, as_float32
from loratool.storage.values import values_of

_PAIRS = pair_table(E2M1, high_first=False)
#: The lower and the upper ends of what codes stand for.
_ENDS = tuple(midpoints(E2M1, upper) for upper in (False, True))
_PAIRS_OF_ENDS = tuple(pair_table(ends, high_first=False) for ends in _ENDS)
_LARGEST_CODE = 6
_POWERS = ("F8_E8M0", "U8")
#: Values that share a scale, where the config does not say another number.
_NV_GROUP, _MX_GROUP = 16, 32
#: Experts of which the codes are held: threads are at most at the end of one and in the next.
_HELD = 2


@dataclass(frozen=True)
class GroupedFP4(Scheme):
    """`code·scale` in float32: two codes a byte, the low one first, and a scale for a group of a
    row, which is a power of two, or (NVFP4) an E4M3 number divided or multiplied by a factor of the
    whole weight. The quotient is rounded to float32."""

    grid: Grid = field(kw_only=True)
    #: What the factor does: "divides" (compressed-tensors), "multiplies" (ModelOpt), or "".
    factor: str = ""

    @property
    def title(self) -> str:
        return "NVFP4" if self.factor else "MXFP4"

    @property
    def bits(self) -> int:
        return 4

    @property
    def snaps(self) -> bool:
        return True

    def opened(self, files: FilePool) -> Opened:
        return _GroupedRows(self, files)


class _GroupedRows(SnappingRows):
    def __init__(self, scheme: GroupedFP4, files: FilePool) -> None:
        self._scheme = scheme
        self._scale = scheme.parts["scale"]
        self._codes = values_of(scheme.main, files)
        self._scales = GridScales(self._scale, scheme.grid, files)
        self._factor = np.float32(1)
        if scheme.factor:
            info = scheme.parts["factor"]
            self._factor = as_float32(read_part(info, files), info.dtype)[0]
            usable = np.isfinite(self._factor) and self._factor != 0
            if not usable:
                raise broken_part(info, f"it holds {self._factor}")

    def rows(self, first: int, last: int, out: Floats) -> None:
        scales = self._products(first, last, out, _PAIRS)
        refuse_overflow(out, scales, _LARGEST_CODE, self._scale)

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        self._products(first, last, out, _PAIRS_OF_ENDS[upper])

    def _products(self, first: int, last: int, out: Floats, pairs: npt.NDArray[np.int64]) -> Floats:
        """What `pairs` says of the codes of these rows, times their scales, which are returned."""
        width = self._scheme.columns // 2
        codes = thread_buffer("codes", (last - first) * width)
        self._codes.read_into(first * width, last * width, codes)
        decode_pairs(pairs, codes, out.reshape(-1))
        scales = self._scales_of(first, last)
        multiply_groups(out, scales, self._scheme.grid.block[1])
        return scales

    def snap(self, first: int, values: Floats) -> Bytes:
        group, scales = self._scheme.grid.block[1], self._scales_of(first, first + len(values))
        divide_groups(values, scales, group)
        codes = to_e2m1(values.reshape(-1))
        octets: Bytes = codes[1::2] << np.uint8(4) | codes[::2]
        decode_pairs(_PAIRS, octets, values.reshape(-1))
        multiply_groups(values, scales, group)
        return octets

    def _scales_of(self, first: int, last: int) -> Floats:
        """The scales of rows, with the factor in them."""
        scales: Floats = self._scales.of_rows(first, last)
        with np.errstate(over="ignore"):
            if self._scheme.factor == "divides":
                scales = scales / self._factor
            elif self._scheme.factor:
                scales = scales * self._factor
        return scales


@dataclass(frozen=True)
class ExpertsMXFP4(Scheme):
    """Experts of gpt-oss: `[E, out, groups, 16]` codes, low one of a byte first, and `[E, out,
    groups]` powers of two, of which the plain model holds `[E, in, out]`."""

    @property
    def title(self) -> str:
        return "MXFP4"

    @property
    def bits(self) -> int:
        return 4

    def opened(self, files: FilePool) -> Opened:
        return _TurnedRows(self, files)


class _TurnedRows(Opened):
    """Rows of the plain model are columns of the codes, so those of a whole expert are read; what
    is asked for of them is decoded."""

    def __init__(self, scheme: ExpertsMXFP4, files: FilePool) -> None:
        self._depth, self._width = scheme.shape[1:]
        self._blocks = values_of(scheme.parts["blocks"], files)
        self._scale = scheme.parts["scales"]
        self._scales = values_of(self._scale, files)
        self._lock = threading.Lock()
        self._held: OrderedDict[int, _Expert] = OrderedDict()

    def rows(self, first: int, last: int, out: Floats) -> None:
        for expert, low, high, own in self._by_expert(first, last, out):
            decode_columns(expert.codes, low, high, own)
            scales = self._multiply(expert, low, high, own)
            refuse_overflow(own, scales, _LARGEST_CODE, self._scale)

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        for expert, low, high, own in self._by_expert(first, last, out):
            codes = expert.codes[:, low // 2 : -(-high // 2)].T
            pairs = np.stack([codes & 15, codes >> 4], 1).reshape(-1, self._width)
            own[:] = _ENDS[upper].take(pairs[low % 2 :][: high - low])
            self._multiply(expert, low, high, own)

    def _by_expert(
        self, first: int, last: int, out: Floats
    ) -> Iterator[tuple[_Expert, int, int, Floats]]:
        """Each expert that rows are of, which of its own they are, and their part of `out`."""
        at = first
        while at < last:
            expert, low = divmod(at, self._depth)
            high = min(self._depth, low + last - at)
            yield self._expert(expert), low, high, out[at - first :][: high - low]
            at += high - low

    def _expert(self, number: int) -> _Expert:
        with self._lock:
            if number not in self._held:
                size, groups = self._width * self._depth, self._depth // _MX_GROUP
                codes = self._blocks.bytes(number * size // 2, (number + 1) * size // 2)
                count = self._width * groups
                scales = self._scales.bytes(number * count, (number + 1) * count)
                self._held[number] = _Expert(
                    codes.reshape(self._width, -1), scales.reshape(self._width, -1)
                )
                if len(self._held) > _HELD:
                    self._held.popitem(last=False)
            return self._held[number]

    def _multiply(self, expert: _Expert, low: int, high: int, out: Floats) -> Floats:
        """Multiply by the scales of these rows of an expert, in place, and return them."""
        groups = range(low // _MX_GROUP, -(-high // _MX_GROUP))
        scales: Floats = E8M0.take(expert.scales[:, groups.start : groups.stop].T)
        if not np.isfinite(scales).all():
            raise broken_part(self._scale, "it holds NaN or infinity")
        for group in groups:
            begin, end = group * _MX_GROUP - low, (group + 1) * _MX_GROUP - low
            one = scales[group - groups.start, None]
            multiply_groups(out[max(0, begin) : end], one, 1)
        return scales


@dataclass(frozen=True)
class _Expert:
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8]


# --- recognition ----------------------------------------------------------------------------------


def _compressed(module: Module) -> GroupedFP4:
    small = module.tensors.get("weight_scale")
    title = "MXFP4" if small is not None and small.dtype in _POWERS else "NVFP4"
    codes, scale = module.want("weight_packed", title), module.want("weight_scale", title)
    bits = {one.bits for one in weight_arguments(module) if one.bits is not None}
    if bits and 4 not in bits:
        known = " or ".join(map(str, sorted(bits)))
        module.refuse(
            f"{codes} holds codes of {known} bits by its config.json, and of bytes that are packed "
            "only those of 4 bits are read",
            UNQUANTISED,
        )
    if title == "MXFP4":
        return _grouped(module, codes, scale)
    return _grouped(module, codes, scale, "divides", "weight_global_scale")


def _of_modelopt(module: Module) -> GroupedFP4:
    codes = module.want("weight", "NVFP4")
    if "pre_quant_scale" in module.tensors:
        module.beside({})
    scale = module.want("weight_scale", "NVFP4")
    return _grouped(module, codes, scale, "multiplies", "weight_scale_2")


def _of_transformers(module: Module) -> GroupedFP4:
    return _grouped(module, module.tensors["weight"], module.tensors[_small_scale(module)])


def _grouped(
    module: Module, codes: TensorInfo, scale: TensorInfo, factor: str = "", role: str = ""
) -> GroupedFP4:
    """The scheme of codes and the scales of their groups, and of the factor of this role."""
    parts = {"codes": codes, "scale": scale}
    module.want_dtype(codes, "U8", "I8")
    module.want_dtype(scale, *(("F8_E4M3",) if factor else (*_POWERS, "F32")))
    if factor:
        parts["factor"] = module.want(role, "NVFP4")
        module.want_dtype(parts["factor"], "F32", "BF16", "F16")
        module.want_shape(parts["factor"], (), (1,))
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.shape else ()
    groups = [one.group for one in weight_arguments(module) if one.group and one.bits == 4]
    usual = [(1, _NV_GROUP if factor else _MX_GROUP)]
    grid = fitting_grid(module, shape, scale, [(1, group) for group in groups], usual)
    used = {r: t for r, t in module.tensors.items() if t in parts.values()}
    return GroupedFP4(shape, parts, module.beside(used), grid=grid, factor=factor)


def _small_scale(module: Module) -> str:
    """The role of a scale that says that a weight of bytes holds two codes in each; "" for none."""
    weight = module.tensors.get("weight")
    if weight is None or weight.dtype != "I8":
        return ""
    shape = (*weight.shape[:-1], -(-2 * weight.shape[-1] // _MX_GROUP)) if weight.shape else ()
    said = module.settings.table.get("expert_dtype") == "fp4"
    for role in ("weight_scale_inv", "scale_inv", "scale"):
        scale = module.tensors.get(role)
        if scale is not None and (scale.dtype in _POWERS or (said and scale.shape == shape)):
            return role
    return ""


def _is_of_modelopt(module: Module) -> bool:
    weight, scale = module.tensors.get("weight"), module.tensors.get("weight_scale")
    if weight is not None and weight.dtype != "U8":
        return False
    if "weight_scale_2" in module.tensors:
        return True
    small = scale is not None and scale.dtype == "F8_E4M3"
    return weight is not None and (small or "pre_quant_scale" in module.tensors)


def _experts(module: Module) -> ExpertsMXFP4:
    blocks, scales = (module.want(role, "MXFP4") for role in ("blocks", "scales"))
    module.want_dtype(blocks, "U8")
    module.want_dtype(scales, *_POWERS)
    if len(blocks.shape) != 4 or blocks.shape[-1] != _MX_GROUP // 2 or not blocks.numel:
        module.refuse(f"{blocks.name} is {list(blocks.shape)}, expected [experts, out, groups, 16]")
    experts, width, groups = blocks.shape[:-1]
    module.want_shape(scales, blocks.shape[:-1])
    parts = {"blocks": blocks, "scales": scales}
    return ExpertsMXFP4((experts, groups * _MX_GROUP, width), parts, module.beside(parts))


def _is_packed(module: Module) -> bool:
    packed = module.tensors.get("weight_packed")
    if packed is None:
        return "weight_global_scale" in module.tensors
    return packed.dtype == "U8"


FORMATS = (
    Format(
        "FP4 of compressed-tensors",
        roles(
            (r"(.+)\.(weight_packed|weight_scale|weight_global_scale)", r"\1.weight", r"\2"),
        ),
        _is_packed,
        _compressed,
    ),
    Format(
        "NVFP4 of ModelOpt",
        roles((r"(.+)\.(weight_scale_2|pre_quant_scale)", r"\1.weight", r"\2")),
        _is_of_modelopt,
        _of_modelopt,
    ),
    Format(
        "MXFP4 of transformers' fp8",
        roles(
            (r"(.+)\.(weight_scale_inv|scale)", r"\1.weight", r"\2"),
            (r"(.+\.\w+)_(scale_inv)", r"\1", r"\2"),
        ),
        lambda module: bool(_small_scale(module)),
        _of_transformers,
    ),
    Format(
        "MXFP4 of gpt-oss",
        roles((r"(.+)_(blocks|scales)", r"\1", r"\2")),
        # `….scales` without a part that GPTQ or AWQ has are something else.
        lambda module: (
            bool({"blocks", "scales"} & module.tensors.keys())
            and not module.name.endswith(".weight")
        ),
        _experts,
    ),
)
