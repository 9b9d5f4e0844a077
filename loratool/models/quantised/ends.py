"""Which numbers the values of a quantised weight stand for: their ends, as tensors of their own.

A value stands for all numbers between two ends, which became it when the weight was quantised. The
ends of a tensor are two more, of its shape, that are read by range like it; also of what is put
together from quantised weights, or is a view of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from loratool.dtypes import dtype_name
from loratool.models.quantised.scheme import ComputedRows, QuantisedTensor, Scheme
from loratool.storage.composed import Composed
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, as_float32
from loratool.storage.values import Values, values_of


@dataclass(frozen=True)
class _Ends(Composed):
    """The lower or the upper ends of a quantised weight."""

    scheme: Scheme | None = field(default=None, compare=False, repr=False)
    upper: bool = False


@dataclass(frozen=True)
class _Widened(Composed):
    """A plain tensor beside quantised ones, as float32: its values stand for themselves."""


def schemes_of(info: TensorInfo) -> tuple[Scheme, ...]:
    """How the quantised weights are stored that a tensor has elements of; () where none is."""
    if isinstance(info, QuantisedTensor):
        return (info.stored_as,)
    parts = info.parts if isinstance(info, Composed) else ()
    return tuple(scheme for part in parts for scheme in schemes_of(part))


def form_of(info: TensorInfo) -> str:
    """What a tensor is stored in, for people: its dtype, or "NF4"."""
    titles = dict.fromkeys(scheme.title for scheme in schemes_of(info))
    return " and ".join(titles) or dtype_name(info.dtype)


def ends_of(info: TensorInfo) -> tuple[TensorInfo, TensorInfo] | None:
    """The lower and the upper ends of what a tensor's values stand for, float32 in its shape; None
    for a tensor of which nothing is quantised."""
    if not schemes_of(info):
        return None
    return _end(info, False), _end(info, True)


def _end(info: TensorInfo, upper: bool) -> TensorInfo:
    if isinstance(info, QuantisedTensor):
        return _Ends(
            info.name, "F32", info.shape, info.file, info.start, stamp=info.stamp,
            parts=info.parts, scheme=info.stored_as, upper=upper,
        )  # fmt: skip
    if isinstance(info, Composed):
        return replace(info, dtype="F32", parts=tuple(_end(part, upper) for part in info.parts))
    return _Widened(
        info.name, "F32", info.shape, info.file, info.start, stamp=info.stamp, parts=(info,)
    )


class _WidenedValues(Values):
    def __init__(self, info: _Widened, files: FilePool) -> None:
        super().__init__(info)
        self._stored = values_of(info.parts[0], files)

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        found = as_float32(self._stored.bytes(low, high), self._stored.info.dtype)
        raw.view(np.float32)[:] = found


@values_of.register
def _(info: _Ends, files: FilePool) -> Values:
    assert info.scheme is not None
    opened = info.scheme.opened(files)
    return ComputedRows(info, partial(opened.ends, upper=info.upper))


@values_of.register
def _(info: _Widened, files: FilePool) -> Values:
    return _WidenedValues(info, files)
