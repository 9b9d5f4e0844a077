"""A Δ that is no product of two small factors, given by rows and columns: Kronecker or sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from loratool.adapters.factors import Kind, ModuleShape, Part
from loratool.storage.computed import read_wide
from loratool.storage.tensors import FilePool, TensorInfo


@dataclass(frozen=True)
class Structured:
    """`Factors` whose Δ is made from `parts` by `load`, which gets their values by name.

    What `load` returns gives the same elements whichever rows and columns are asked for together,
    because an undo file relies on it. `rank` bounds the rank of Δ.
    """

    algorithm: str
    outline: ModuleShape
    parts: dict[str, TensorInfo]
    load: Callable[..., Part] = field(compare=False, repr=False)
    rank: int
    alpha: float | None = None
    scale: float | None = None
    scale_from: str = ""
    magnitude: None = field(default=None, init=False)
    bias: None = field(default=None, init=False)
    adds: bool = field(default=True, init=False)
    is_sound: bool = field(default=True, init=False)

    @property
    def path(self) -> str:
        return self.outline.path

    @property
    def kind(self) -> Kind:
        return self.outline.kind

    @property
    def shape(self) -> tuple[int, int]:
        return self.outline.shape

    @property
    def dtype(self) -> str:
        return next(info.dtype for info in self.parts.values() if info.is_float)

    @property
    def tensors(self) -> list[TensorInfo]:
        return list(self.parts.values())

    @property
    def parameters(self) -> int:
        return sum(info.numel for info in self.tensors)

    @property
    def weight_name(self) -> str:
        return f"{self.path}.weight"

    def left_right(self, files: FilePool | None = None) -> None:
        """There is no such pair, or it would be larger than Δ."""

    def part_of(self, files: FilePool) -> Part:
        return self.load(**{name: read_wide(info, files) for name, info in self.parts.items()})
