"""How the weight of one module is stored quantised: its parts, and the values that they stand for.

A format has a `Scheme`: the tensors that a weight is made of, and how rows of it are computed from
these. A `QuantisedTensor` is the weight as the plain model would hold it, of the dtype that the
scheme gives; whoever reads tensors by range (`storage.values`) reads it like any other.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loratool.errors import BaseError
from loratool.models.quantised.numbers import add_groups, thread_buffer
from loratool.storage.composed import Composed
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, as_float32, block_elements
from loratool.storage.values import Values, values_of

#: Rows of a weight, `[n, columns]`.
Floats = npt.NDArray[np.float32]


class Opened(ABC):
    """The rows of one quantised weight, computed when they are asked for, from any thread.

    A weight of more than two dimensions is seen as one matrix: `[E, R, C]` as `[E·R, C]`.
    """

    @abstractmethod
    def rows(self, first: int, last: int, out: Floats) -> None:
        """Fill `out`, `[last - first, columns]`, with rows `[first, last)` of the weight.

        Raises BaseError for parts that no number comes of: NaN codes, scales that are not finite.
        """

    @abstractmethod
    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        """Fill `out` with the lower or the upper ends of what the values of these rows stand for.

        Numbers between the two are nearer to the value than to others that its scale allows.
        Infinite where all beyond the last value becomes it; not a number there for a scale of zero.
        """


class SnappingRows(Opened):
    """Rows whose nearest codes are known: those of a scheme that `snaps`."""

    @abstractmethod
    def snap(self, first: int, values: Floats) -> Bytes:
        """Move rows from `first` on, `[n, columns]`, to the nearest that the stored scales allow,
        in place, and return the codes of these, flat."""


class OnGrid(Opened):
    """Rows of whole numbers times scales, perhaps less a zero point: the numbers that rows could
    hold lie on a grid, which stays what it is when others come into them."""

    @abstractmethod
    def grid(self, first: int, last: int) -> tuple[Floats, Floats | None, int]:
        """Scales and zero points (None for none) of rows `[first, last)`, `[last - first, groups]`,
        and how many columns, side by side, are of a group."""

    def ends(self, first: int, last: int, out: Floats, upper: bool) -> None:
        self.rows(first, last, out)
        scales, _, group = self.grid(first, last)
        add_groups(out, scales * np.float32(0.5 if upper else -0.5), group)


@dataclass(frozen=True)
class Scheme(ABC):
    """How one weight is stored.

    `shape` is the weight's, as the plain model stores it; `parts` are the tensors in the files that
    it is made of, by role; `extras` those that go with it and are no part of its value (scales of
    activations, descriptions): what is opened leaves both behind.
    """

    shape: tuple[int, ...]
    parts: dict[str, TensorInfo] = field(compare=False)
    extras: tuple[TensorInfo, ...] = field(default=(), compare=False)

    @property
    @abstractmethod
    def title(self) -> str:
        """For people: "NF4", "FP8 in blocks of 128×128"."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    def dtype(self) -> str:
        """The dtype of the values: float32 where the product is exact or rounded there, otherwise
        what the format's own library rounds to before anybody computes with it."""
        return "F32"

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rescaled(self) -> bool:
        """Whether this is another weight than the original's, with scales of its inputs in it."""
        return False

    @property
    def is_nearest(self) -> bool:
        """Whether every number became the nearest value that its scale allows; otherwise values
        were chosen with data, and nothing is known of the number that one stands for."""
        return True

    @property
    def blur(self) -> float:
        """How far off the ends of what a value stands for may be, as a share of what is between
        them: by what its library rounds on the way to the codes."""
        return 0.0

    @property
    def on_load(self) -> bool:
        """Whether programs make it of a plain weight while they load a model."""
        return False

    @property
    def snaps(self) -> bool:
        """Whether the nearest codes of values are told by `SnappingRows.snap`, row by row as the
        main part holds them."""
        return False

    @property
    def all_parts(self) -> tuple[TensorInfo, ...]:
        """All tensors that are there for this weight alone."""
        return (*self.parts.values(), *self.extras)

    @property
    def main(self) -> TensorInfo:
        """The part that stands for the weight: its codes."""
        return next(iter(self.parts.values()))

    @abstractmethod
    def opened(self, files: FilePool) -> Opened:
        """How its rows are computed, with what is read of the parts through `files`."""


@dataclass(frozen=True)
class QuantisedTensor(Composed):
    """A weight as the plain model would hold it, which is stored by a scheme."""

    scheme: Scheme | None = field(default=None, compare=False, repr=False)

    @property
    def run(self) -> int:
        return self.shape[-1]

    @property
    def stored_as(self) -> Scheme:
        assert self.scheme is not None
        return self.scheme


def quantised(name: str, scheme: Scheme) -> QuantisedTensor:
    """The weight of this name that a scheme stands for."""
    main = scheme.main
    return QuantisedTensor(
        name, scheme.dtype, scheme.shape, main.file, main.start, stamp=main.stamp,
        parts=tuple(scheme.parts.values()), scheme=scheme,
    )  # fmt: skip


class ComputedRows(Values):
    """Elements of a quantised weight: whole rows are computed, and rounded to the dtype."""

    def __init__(self, info: TensorInfo, compute: Callable[[int, int, Floats], None]) -> None:
        """`compute(first, last, out)` fills `out` with rows, as `Opened.rows` does."""
        super().__init__(info)
        self._compute = compute
        self._columns = info.shape[-1]

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        columns, size = self._columns, self.info.itemsize
        at = low
        # What is too large becomes infinite, which whoever asked is to see.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            while at < high:
                first = at // columns
                last = min(first + block_elements(columns) // columns, -(-high // columns))
                stop = min(high, last * columns)
                self._fill(at, stop, first, last, raw[(at - low) * size : (stop - low) * size])
                at = stop

    def _fill(self, low: int, high: int, first: int, last: int, raw: Bytes) -> None:
        """Fill `raw` with elements `[low, high)`, which are in rows `[first, last)`."""
        columns = self._columns
        start = first * columns
        if self.info.dtype == "F32" and (start, high) == (low, last * columns):
            self._compute(first, last, raw.view(np.float32).reshape(-1, columns))
            return
        values = thread_buffer("rows", (last - first) * columns, np.float32)
        self._compute(first, last, values.reshape(-1, columns))
        round_into(values[low - start : high - start], self.info.dtype, raw)


def round_into(values: Floats, dtype: str, raw: Bytes) -> None:
    """Fill `raw` with flat float32 values rounded once to a dtype (ties to even)."""
    import torch  # NumPy has no bfloat16, and is slow with float16

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    torch.from_numpy(raw).view(kind).copy_(torch.from_numpy(values))


def round_in_place(values: Floats, dtype: str) -> None:
    """Round float32 values to a dtype, where they are."""
    if dtype != "F32":
        import torch  # NumPy has no bfloat16

        numbers = torch.from_numpy(values)
        numbers.copy_(numbers.to(torch.float16 if dtype == "F16" else torch.bfloat16))


@values_of.register
def _(info: QuantisedTensor, files: FilePool) -> Values:
    return ComputedRows(info, info.stored_as.opened(files).rows)


# --- for formats ----------------------------------------------------------------------------------


def read_part(info: TensorInfo, files: FilePool) -> Bytes:
    """All bytes of a part, `[nbytes]` uint8."""
    values = values_of(info, files)
    return values.bytes(0, values.length)


def blur_of_sums(bits: int) -> float:
    """The blur of codes of so many bits that are sums with a zero point, in bfloat16."""
    return 2.0 ** (bits - 9)


class HeldPart:
    """A part that is read whole when somebody first asks for it, and kept."""

    def __init__(self, info: TensorInfo, files: FilePool) -> None:
        self._info, self._files = info, files
        # Blocks come from several threads; one reads.
        self._lock = threading.Lock()
        self._raw: Bytes | None = None

    def raw(self) -> Bytes:
        """Its bytes, `[nbytes]` uint8."""
        with self._lock:
            if self._raw is None:
                self._raw = read_part(self._info, self._files)
            return self._raw


def read_finite(info: TensorInfo, files: FilePool, times: float = 1) -> Floats:
    """A part of floats, in its own shape, which are numbers also when multiplied by `times`.

    Raises BaseError for NaN and infinity in it.
    """
    values = as_float32(read_part(info, files), info.dtype).reshape(info.shape)
    highest = float(np.abs(values).max(initial=0))
    if not math.isfinite(highest):
        raise broken_part(info, "it holds NaN or infinity")
    if highest * times > float(np.finfo(np.float32).max):
        raise broken_part(info, "it makes numbers that float32 cannot hold")
    return values


def broken_part(info: TensorInfo, what: str) -> BaseError:
    """The error for a part that no number comes of."""
    return BaseError(f"{info.name} ({info.file}): {what}.", "The base is damaged; fetch it again.")
