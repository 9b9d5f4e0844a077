"""What makes another weight of a weight, and is no sum: rotations, reflections, rescaling.

A `Function` is to such a module what `Factors` are to one of low rank. It gives the new weight as a
tensor whose elements are computed from those of the base when somebody reads them, so that a merge
writes it like a tensor that an adapter replaces.
"""

from __future__ import annotations

from typing import Protocol

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

    def applied(self, weight: TensorInfo, transposed: bool) -> TensorInfo:
        """The new weight, in the shape of `weight` and in float32 (float64 of a float64 one).

        `transposed` says that the weight is stored `[in, out]`. Raises MisfitError where it does
        not fit.
        """
