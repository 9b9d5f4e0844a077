"""Integers of 2 to 8 bits packed into words, as compressed-tensors' pack-quantized has them.

Source: compressed_tensors/compressors/pack_quantized (codes of two's complement, stored with
2^(bits − 1) added, lowest bits first; dense over the words of a row since 0.18, before that as many
as fit into a word; zero points packed likewise, down the rows) and
quantization/lifecycle/forward.py (`weight_g_idx`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.arguments import weight_arguments
from loratool.models.quantised.grid import Grid, GridScales, fitting_grid, refuse_overflow
from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import (
    decode_integers,
    decode_pairs,
    integers_as_float32,
    multiply_groups,
    pair_table,
    subtract_groups,
    thread_buffer,
    unpacked,
)
from loratool.models.quantised.scheme import (
    Floats,
    OnGrid,
    Scheme,
    blur_of_sums,
    broken_part,
    read_part,
)
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import Values, values_of

_WORD = 32
_PAIRS = pair_table(np.arange(-8, 8, dtype=np.float32), high_first=False)
_WIDTHS = range(2, 9)
#: The version of compressed-tensors since which there are no gaps between codes.
_DENSE_SINCE = (0, 18)


@dataclass(frozen=True)
class Packing:
    """Bits of a code, and whether it may straddle words."""

    width: int
    straddling: bool

    def words(self, count: int) -> int:
        """How many words so many codes take."""
        if self.straddling:
            return -(-count * self.width // _WORD)
        return -(-count // (_WORD // self.width))


@dataclass(frozen=True)
class PackedIntegers(Scheme):
    """`(code − zero)·scale` in float32, without zero points for symmetric ones."""

    packing: Packing = field(kw_only=True)
    grid: Grid = field(kw_only=True)

    @property
    def title(self) -> str:
        group, columns = self.grid.block[1], self.grid.columns
        return f"INT{self.bits} " + ("per channel" if group >= columns else f"in groups of {group}")

    @property
    def bits(self) -> int:
        return self.packing.width

    @property
    def blur(self) -> float:
        return blur_of_sums(self.bits) if "zero" in self.parts else 0.0

    def opened(self, files: FilePool) -> OnGrid:
        return _PackedRows(self, files)


class _PackedRows(OnGrid):
    def __init__(self, scheme: PackedIntegers, files: FilePool) -> None:
        self._scheme = scheme
        parts, grid = scheme.parts, scheme.grid
        self._codes = values_of(scheme.main, files)
        self._words = scheme.main.shape[1]
        self._scales = GridScales(parts["scale"], grid, files)
        zero = parts.get("zero")
        self._zeros: _Zeros | GridScales | None = None
        if zero is not None and zero.dtype == "I32":
            self._zeros = _Zeros(values_of(zero, files), scheme)
        elif zero is not None:
            self._zeros = GridScales(zero, grid, files, integers_as_float32)
        self._order = _order(parts["order"], grid, files) if "order" in parts else None

    def rows(self, first: int, last: int, out: Floats) -> None:
        words = thread_buffer("codes", (last - first) * self._words * 4)
        self._codes.read_into(first * self._words, last * self._words, words)
        self._decode(words.reshape(last - first, -1), out)
        scales, zeros, group = self.grid(first, last)
        if zeros is not None:
            subtract_groups(out, zeros, group)
        multiply_groups(out, scales, group)
        refuse_overflow(out, scales, 1 << self._scheme.bits, self._scheme.parts["scale"])

    def grid(self, first: int, last: int) -> tuple[Floats, Floats | None, int]:
        group = self._scheme.grid.block[1]
        scales = self._scales.of_rows(first, last)
        zeros = None if self._zeros is None else self._zeros.of_rows(first, last)
        if self._order is not None:  # columns of a group do not lie side by side
            group = 1
            scales = scales.take(self._order, 1)
            zeros = None if zeros is None else zeros.take(self._order, 1)
        return scales, zeros, group

    def _decode(self, words: npt.NDArray[np.uint8], out: Floats) -> None:
        """The codes of rows of words as whole numbers."""
        columns, width = self._scheme.columns, self._scheme.bits
        if width != 4:
            codes = unpacked(words.view(np.int32), width, self._scheme.packing.straddling)
            decode_integers(codes[:, :columns], out)
            out -= np.float32(1 << width - 1)
        elif 2 * words.shape[1] == columns:
            decode_pairs(_PAIRS, words.reshape(-1), out.reshape(-1))
        else:
            padded = thread_buffer("padded", 2 * words.size, np.float32)
            decode_pairs(_PAIRS, words.reshape(-1), padded)
            out[:] = padded.reshape(len(words), -1)[:, :columns]


class _Zeros:
    """Zero points, `[words of rows, groups]`: those of 32 rows, or as many as fit into one, begin
    with a word."""

    def __init__(self, values: Values, scheme: PackedIntegers) -> None:
        self._values = values
        self._groups = scheme.grid.across
        self._packing = scheme.packing

    def of_rows(self, first: int, last: int) -> Floats:
        """Those of rows `[first, last)`: `[rows, groups]`."""
        width, straddling = self._packing.width, self._packing.straddling
        begin = first - first % (_WORD if straddling else _WORD // width)
        low, high = self._packing.words(begin), self._packing.words(last)
        raw = self._values.bytes(low * self._groups, high * self._groups)
        words = raw.view(np.int32).reshape(-1, self._groups)
        codes = unpacked(words.T, width, straddling)[:, first - begin : last - begin]
        zeros = np.empty((last - first, self._groups), np.float32)
        np.subtract(codes.T, np.float32(1 << width - 1), out=zeros)
        return zeros


def _order(info: TensorInfo, grid: Grid, files: FilePool) -> npt.NDArray[np.intp] | None:
    """The group of every column; None where they lie side by side."""
    kind = np.int32 if info.dtype == "I32" else np.int64
    order = read_part(info, files).view(kind).astype(np.intp)
    if (order == -1).all():  # what the library fills it with before it knows
        return None
    if order.min() < 0 or order.max() >= grid.across:
        raise broken_part(info, f"it names groups that are not among the {grid.across} of a row")
    side_by_side = np.arange(grid.columns) // grid.block[1]
    return None if np.array_equal(order, side_by_side) else order


# --- recognition ----------------------------------------------------------------------------------


def _scheme(module: Module) -> PackedIntegers:
    title = "packed integers"
    packed, scale = module.want("weight_packed", title), module.want("weight_scale", title)
    module.want_dtype(packed, "I32")
    module.want_dtype(scale, "BF16", "F16", "F32")
    rows, columns = _shape(module, module.want("weight_shape", title))
    if len(packed.shape) != 2 or packed.shape[0] != rows:
        module.refuse(f"{packed} is not of the {rows} rows that its weight_shape names")
    packing, grid = _packing_and_grid(module, (rows, columns))
    parts = {"codes": packed, "scale": scale}
    zero, order = (module.tensors.get(role) for role in ("weight_zero_point", "weight_g_idx"))
    if zero is not None:
        module.want_dtype(zero, "I32", "I8")
        words = (packing.words(rows), grid.across)
        module.want_shape(zero, words if zero.dtype == "I32" else scale.shape)
        parts["zero"] = zero
    if order is not None:
        module.want_dtype(order, "I32", "I64")
        module.want_shape(order, (columns,))
        parts["order"] = order
    used = {r: t for r, t in module.tensors.items() if t in parts.values()}
    extras = module.beside({**used, "weight_shape": module.tensors["weight_shape"]})
    return PackedIntegers(
        (rows, columns), parts, (module.tensors["weight_shape"], *extras),
        packing=packing, grid=grid,
    )  # fmt: skip


def _shape(module: Module, info: TensorInfo) -> tuple[int, int]:
    """Rows and columns of the weight, which a tensor holds."""
    module.want_dtype(info, "I64", "I32")
    module.want_shape(info, (2,))
    kind = np.int64 if info.dtype == "I64" else np.int32
    rows, columns = (int(n) for n in np.frombuffer(module.described["weight_shape"], kind))
    if rows <= 0 or columns <= 0:
        module.refuse(f"{info.name} holds {[rows, columns]}, which is no shape")
    return rows, columns


def _packing_and_grid(module: Module, shape: tuple[int, int]) -> tuple[Packing, Grid]:
    """How codes are packed and what shares a scale: of what the config names that which fits the
    tensors. Without a config it follows from their shapes alone.

    Raises BaseError where nothing fits, and where several do.
    """
    columns = shape[1]
    packed, scale = module.tensors["weight_packed"], module.tensors["weight_scale"]
    fitting = _packings(module, shape)
    said = [one for one in weight_arguments(module) if one.bits is not None]
    named = [one for one in said if one.bits in {packing.width for packing in fitting}]
    if not fitting or (said and not named):
        known = sorted({one.bits or 0 for one in said} or _WIDTHS)
        module.refuse(
            f"{packed} is {packed.shape[1]} words a row for {columns} columns, which are none of "
            f"{' or '.join(map(str, known))} bits"
        )
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    blocks = [(1, one.group) for one in named if one.group]
    whole = len(blocks) < len(named) or not said
    if not said and groups and columns % groups == 0:
        blocks.append((1, columns // groups))
    grid = fitting_grid(module, shape, scale, blocks, whole=whole)
    if said:
        widths = {one.bits for one in named if one.group in (None, grid.block[1])}
        fitting = [packing for packing in fitting if packing.width in widths]
    if len(fitting) > 1:
        fitting = _of_version(module, fitting)
    if len(fitting) != 1:
        ways = " or ".join(
            f"{packing.width} bits {'without gaps' if packing.straddling else 'by whole words'}"
            for packing in fitting
        )
        module.refuse(
            f"{packed} may hold codes of {ways}, and config.json does not say which it is, nor the "
            "version that wrote it",
            UNQUANTISED,
        )
    return fitting[0], grid


def _packings(module: Module, shape: tuple[int, int]) -> list[Packing]:
    """Those that the number of words allows."""
    rows, columns = shape
    packed, zero = module.tensors["weight_packed"], module.tensors.get("weight_zero_point")
    of_zeros = zero.shape[0] if zero is not None and zero.dtype == "I32" and zero.shape else None
    found = []
    for width in _WIDTHS:
        ways = [Packing(width, True)]
        # Codes that all begin in the first word are where they are either way.
        if _WORD % width and max(columns, rows if of_zeros else 0) > _WORD // width:
            ways.append(Packing(width, False))
        ways = [way for way in ways if way.words(columns) == packed.shape[1]]
        found += [way for way in ways if of_zeros in (None, way.words(rows))] or ways
    return found


def _of_version(module: Module, packings: list[Packing]) -> list[Packing]:
    """Those that the version of the library in the config writes."""
    version = re.match(r"(\d{1,6})\.(\d{1,6})", str(module.settings.table.get("version")))
    if version is None:
        return packings
    dense = (int(version[1]), int(version[2])) >= _DENSE_SINCE
    return [one for one in packings if one.straddling == dense or _WORD % one.width == 0]


FORMATS = (
    Format(
        "packed integers of compressed-tensors",
        roles(
            (
                r"(.+)\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx)",
                r"\1.weight",
                r"\2",
            ),
        ),
        lambda module: bool(
            {"weight_packed", "weight_shape", "weight_g_idx"} & module.tensors.keys()
        ),
        _scheme,
        descriptions=("weight_shape",),
    ),
)
