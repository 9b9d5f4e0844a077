"""torchao: int8 and FP8 codes with scales of blocks; what they are, the file's metadata says.

Source: torchao/prototype/safetensors/safetensors_support.py (`flatten_tensor_state_dict`),
torchao/quantization/quant_primitives.py (`_dequantize_affine_no_dtype_check`,
`_dequantize_affine_float8`). A parameter `M.weight` is stored as `M._weight_qdata`,
`M._weight_scale` and so on; under its own name the metadata has its class and that one's fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.errors import FileError
from loratool.models.quantised.module import UNQUANTISED, Format, Module, roles
from loratool.models.quantised.numbers import (
    E4M3_ENDS,
    add_groups,
    decode_e4m3,
    decode_integers,
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
    read_finite,
    read_part,
    round_in_place,
)
from loratool.storage.fields import value_text
from loratool.storage.jsonfile import parse_json
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import values_of

#: Classes whose codes are whole bytes in the order of the weight, with the dtype of these.
_CLASSES = {"Int8Tensor": "I8", "IntxUnpackedToInt8Tensor": "I8", "Float8Tensor": "F8_E4M3"}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_FLOATS = tuple(_DTYPES.values())


@dataclass(frozen=True)
class TorchAo(Scheme):
    """`(code − zero)·scale`, with a scale, and mostly a zero, for each block."""

    kind: str = "int8"
    #: Sizes of a block along each axis.
    block: tuple[int, ...] = ()
    #: What a difference with a zero that is no integer is rounded to.
    rounded: str = "F32"

    @property
    def title(self) -> str:
        return f"torchao {self.kind}"

    @property
    def bits(self) -> int:
        return 8 if self.kind == "FP8" else int(self.kind.removeprefix("int"))

    @property
    def blur(self) -> float:
        return blur_of_sums(self.bits) if "zero_point" in self.parts else 0.0

    def opened(self, files: FilePool) -> Opened:
        return _Rows(self, files)


class _Rows(Opened):
    def __init__(self, scheme: TorchAo, files: FilePool) -> None:
        parts = scheme.parts
        self._scheme = scheme
        self._codes = values_of(parts["qdata"], files)
        #: Blocks along each axis, and their scales and zeros by rows of blocks.
        self._blocks = tuple(n // b for n, b in zip(scheme.shape, scheme.block, strict=True))
        scales = read_finite(parts["scale"], files, times=448)
        self._scales = scales.reshape(-1, self._blocks[-1])
        zeros = parts.get("zero_point")
        self._zeros = None if zeros is None else _zeros(zeros, files).reshape(self._scales.shape)

    def rows(self, first: int, last: int, out: Floats) -> None:
        scheme, columns = self._scheme, self._scheme.columns
        codes = thread_buffer("codes", (last - first) * columns)
        self._codes.read_into(first * columns, last * columns, codes)
        if scheme.kind != "FP8":
            decode_integers(codes.view(np.int8), out.reshape(-1))
        elif has_e4m3_nan(codes):
            raise broken_part(self._codes.info, "it holds NaN")
        else:
            decode_e4m3(codes, out.reshape(-1))
        blocks = self._blocks_of(first, last)
        if self._zeros is not None:
            subtract_groups(out, self._zeros[blocks], scheme.block[-1])
            round_in_place(out, scheme.rounded)
        multiply_groups(out, self._scales[blocks], scheme.block[-1])

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        scheme, columns = self._scheme, self._scheme.columns
        scales = self._scales[self._blocks_of(first, last)]
        if scheme.kind != "FP8":
            self.rows(first, last, out)
            add_groups(out, scales * np.float32(0.5 if upper else -0.5), scheme.block[-1])
            return
        codes = thread_buffer("codes", (last - first) * columns)
        self._codes.read_into(first * columns, last * columns, codes)
        E4M3_ENDS[upper].take(codes, out=out.reshape(-1), mode="clip")
        multiply_groups(out, scales, scheme.block[-1])

    def _blocks_of(self, first: int, last: int) -> npt.NDArray[np.intp]:
        """The row of blocks that each of these rows is in."""
        at = np.unravel_index(np.arange(first, last), self._scheme.shape[:-1])
        of = tuple(i // b for i, b in zip(at, self._scheme.block[:-1], strict=True))
        found: npt.NDArray[np.intp] = np.ravel_multi_index(of, self._blocks[:-1])
        return found


def _zeros(info: TensorInfo, files: FilePool) -> Floats:
    if info.dtype == "I8":
        return integers_as_float32(read_part(info, files), info.dtype)
    return read_finite(info, files)


def _scheme(module: Module) -> TorchAo:
    kind, fields, names = _described(module)
    codes, scale = module.want("qdata", "torchao"), module.want("scale", "torchao")
    module.want_dtype(codes, _CLASSES[kind])
    module.want_dtype(scale, *_FLOATS)
    if len(codes.shape) < 2 or not codes.numel:
        module.refuse(f"{codes} is no matrix")
    if "act_pre_scale" in module.tensors:
        module.refuse(
            "its inputs are multiplied by act_pre_scale before the weight is, so it is not the "
            "weight of a plain model",
            UNQUANTISED,
        )
    for name in names:
        module.want(name, "torchao")
    block = _block(module, fields, codes, scale)
    blocks = tuple(n // b for n, b in zip(codes.shape, block, strict=True))
    flat = tuple(n for n in blocks if n > 1)
    module.want_shape(scale, blocks, flat or (1,), flat)
    parts, rounded = {"qdata": codes, "scale": scale}, "F32"
    zeros = module.tensors.get("zero_point")
    if zeros is not None and kind != "Float8Tensor":
        module.want_dtype(zeros, "I8", *_FLOATS)
        module.want_shape(zeros, blocks, flat or (1,), flat)
        parts["zero_point"] = zeros
        if zeros.dtype != "I8":
            rounded = _dtype(module, fields)
    extras = module.beside(parts, ("act_quant_scale", "act_quant_zero_point"))
    return TorchAo(codes.shape, parts, extras, _kind(module, kind, fields), block, rounded)


def _described(module: Module) -> tuple[str, dict[str, Any], list[str]]:
    """The class of a parameter, its fields, and the names of its tensors."""
    text = module.base.metadata.get(module.name)
    if text is None:
        module.refuse(
            "its codes are torchao's, and the metadata of its file does not say what they are",
            "Something wrote the file again and dropped its metadata: fetch the original.",
        )
    try:
        found = parse_json(text.encode("utf-8", "replace"), module.name)
    except FileError:
        found = None
    if not isinstance(found, dict):
        module.refuse("what the metadata of its file says of it is no JSON object")
    kind, fields, names = (found.get(key) for key in ("_type", "_data", "_tensor_data_names"))
    if not isinstance(kind, str) or kind not in _CLASSES:
        module.refuse(
            f"it is stored as torchao's {kind if isinstance(kind, str) else value_text(kind):.80}, "
            f"and read are {', '.join(_CLASSES)}",
            UNQUANTISED,
        )
    if not isinstance(fields, dict):
        module.refuse("the metadata of its file has no fields of it (_data)")
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return kind, fields, listed


def _block(
    module: Module, fields: dict[str, Any], codes: TensorInfo, scale: TensorInfo
) -> tuple[int, ...]:
    """Sizes of a block: the whole tensor where there is one scale only."""
    said = fields.get("block_size")
    if math.prod(scale.shape) == 1 and said is None:
        return codes.shape
    good = isinstance(said, list) and len(said) == len(codes.shape) and all(
        type(b) is int and b > 0 and n % b == 0 for n, b in zip(codes.shape, said, strict=True)
    )  # fmt: skip
    if not good or not isinstance(said, list):
        module.refuse(
            f"its block_size is {value_text(said)}, expected sizes that divide {list(codes.shape)}"
        )
    return tuple(said)


def _kind(module: Module, name: str, fields: dict[str, Any]) -> str:
    """What its codes are, for people."""
    if name != "IntxUnpackedToInt8Tensor":
        return "FP8" if name == "Float8Tensor" else "int8"
    said = fields.get("target_dtype")
    code = said.get("_data") if isinstance(said, dict) else said
    if code not in [f"int{bits}" for bits in range(1, 9)]:
        module.refuse(f"its target_dtype is {value_text(said)}, expected int1 to int8")
    return str(code)


def _dtype(module: Module, fields: dict[str, Any]) -> str:
    """The dtype that the library computes in."""
    said = fields.get("dtype")
    code = said.get("_data") if isinstance(said, dict) else said
    if not isinstance(code, str) or code not in _DTYPES:
        module.refuse(f"its dtype is {value_text(said)}, expected {' or '.join(_DTYPES)}")
    return _DTYPES[code]


FORMATS = (
    Format(
        "torchao",
        roles(
            (
                r"(.+)\._(\w+?)_(qdata|scale|zero_point|act_quant_scale|act_quant_zero_point|"
                r"act_pre_scale)",
                r"\1.\2",
                r"\3",
            )
        ),
        lambda module: "qdata" in module.tensors,
        _scheme,
    ),
)
