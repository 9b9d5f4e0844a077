"""What makes another weight of a weight, and is no sum: rotations, reflections, rescaling.

A `Function` is to such a module what `Factors` are to one of low rank. It gives the new weight as a
tensor whose elements are computed from those of the base when somebody reads them, so that a merge
writes it like a tensor that an adapter replaces. `RowFunction` makes rows of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from loratool.adapters.changed import ChangedTensor, Rows
from loratool.models.layouts.parameter import MisfitError
from loratool.storage.tensors import TensorInfo


class Function(Protocol):
    """The trained change of one weight that needs the weight itself.

    `algorithm` names it for people ("OFT"). `shape` is `(out, in)` of the weight it is for, where
    the file tells.
    """

    @property
    def path(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int] | None: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...
    @property
    def weight_name(self) -> str:
        """The tensor of the model that it changes."""

    @property
    def optional(self) -> bool:
        """Whether a base without that tensor is right too: not all layers have a bias."""

    def applied(self, weight: TensorInfo, transposed: bool) -> TensorInfo:
        """The new weight, in the shape of `weight` and in float32 (float64 of a float64 one).

        `transposed` says that the weight is stored `[in, out]`. Raises MisfitError where it does
        not fit.
        """


@dataclass(frozen=True)
class RowFunction:
    """A `Function` that makes `step` rows of the new weight from these of the old one.

    `rows`, given the values of `parts` by name, makes the function of rows; `columns` the one for
    a weight that is stored `[in, out]`, and is None where no such weight is trained. `step` 0 is
    all rows. What `gather` makes of rows is summed over all of them first, and given to `rows`, not
    to `columns`, as `gathered`. Where it `rounds`, either is given the `dtype` of the weight too.

    Either side of `shape` is 0 where the file does not tell it; then `in` is at least a multiple of
    `multiple`. Of a convolution `shape` has the kernel in `in`, or `channels` are known without it.
    Where it is `pointwise`, a kernel of more than one element is refused: what PEFT computes with
    it no merged weight does.
    """

    path: str
    algorithm: str
    parts: dict[str, TensorInfo]
    shape: tuple[int, int]
    rows: Callable[..., Rows] = field(compare=False, repr=False)
    columns: Callable[..., Rows] | None = field(default=None, compare=False, repr=False)
    gather: Callable[..., Rows] | None = field(default=None, compare=False, repr=False)
    step: int = 1
    multiple: int = 1
    channels: int | None = None
    pointwise: bool = False
    rounds: bool = False
    leaf: str = "weight"
    optional: bool = False

    @property
    def tensors(self) -> list[TensorInfo]:
        return list(self.parts.values())

    @property
    def weight_name(self) -> str:
        return f"{self.path}.{self.leaf}"

    def applied(self, weight: TensorInfo, transposed: bool) -> TensorInfo:
        stored = weight.shape
        out, width = (stored[0], math.prod(stored[1:])) if stored else (0, 0)
        if transposed:
            out, width = width, out
        wanted = self.shape
        fits = all(n in (0, m) for n, m in zip(wanted, (out, width), strict=True))
        fits = fits and width % self.multiple == 0 and self.channels in (None, *stored[1:2])
        if not (weight.is_float and fits):
            raise MisfitError(
                f"its shapes do not fit: {self.algorithm} is for [{_size(wanted[0])}, "
                f"{_size(wanted[1])}], {weight.name} is {weight.dtype} {list(stored)}"
            )
        if self.pointwise and math.prod(stored[2:]) > 1:
            raise MisfitError(
                f"{weight.name} is a convolution with a kernel {list(stored[2:])}: with "
                f"{self.algorithm} PEFT's forward pass adds up overlapping patches, which no "
                "merged weight does"
            )
        made = self.columns if transposed else self.rows
        if made is None:
            raise MisfitError(
                f"{weight.name} is stored [in, out], and {self.algorithm} is known for weights "
                "stored [out, in] only"
            )
        if self.rounds:
            made = partial(made, dtype=weight.dtype)
        step = self.step or stored[0]
        if stored[0] % step:
            raise MisfitError(f"{weight.name} has {stored[0]} rows, which are no groups of {step}")
        return ChangedTensor(
            weight.name, "F64" if weight.dtype == "F64" else "F32", stored, weight.file,
            weight.start, stamp=weight.stamp, parts=(weight, *self.tensors),
            names=tuple(self.parts), made=made, gather=None if transposed else self.gather,
            step=step,
        )  # fmt: skip


def _size(count: int) -> str:
    return str(count) if count else "any"
