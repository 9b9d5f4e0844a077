"""The weights of an adapter that is written, adapter_model.safetensors.

Ranks may be known only when the last module has been computed, and the header of a safetensors file
comes first. So factors are kept in a log of results until then; memory holds one module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.factors import ModuleShape
from loratool.dtypes import DTYPE_BITS, FLOAT_FORMATS, dtype_name
from loratool.errors import ValueRangeError
from loratool.linalg.lowrank import Factor
from loratool.linalg.spectrum import gram
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_MODEL
from loratool.storage.header import build_header
from loratool.storage.shardfile import ShardWriter
from loratool.storage.tensors import Bytes, as_bytes, as_float32
from loratool.streams.results import Piece, ResultLog
from loratool.streams.threads import computed

_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Extra:
    """A tensor beside the factors; `read` gives its bytes, piece by piece."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Bytes]]


@dataclass(frozen=True)
class _Kept:
    """Where the factors of a module lie, `rank` columns and rows of them."""

    outline: ModuleShape
    rank: int
    data: Piece


def checked_bytes(name: str, values: npt.NDArray[Any], dtype: str) -> Bytes:
    """The bytes of `values` in a dtype; ValueRangeError if one is too large for it."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest < FLOAT_FORMATS[dtype].overflow:
        raise ValueRangeError(
            f"{name} has values up to {largest:.3g}, too large for {dtype_name(dtype)}.",
            "Write it in a wider dtype: --dtype float32.",
        )
    return as_bytes(values, dtype)


def factor_bytes(path: str, b: npt.NDArray[Any], a: npt.NDArray[Any], dtype: str) -> Bytes:
    """The bytes of `a [k, in]` and of `bᵀ [k, out]`, so that ranks are runs of rows in both.

    Raises ValueRangeError if a value is too large for the dtype.
    """
    halves = (("lora_A", a), ("lora_B", b.T))
    return np.concatenate([checked_bytes(f"{path}: {n}", x, dtype) for n, x in halves])


def tensors_of(
    outlines: Sequence[ModuleShape], ranks: Sequence[int], dtype: str, extras: Sequence[Extra]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of all tensors of the file, in its order."""
    found = [
        (key, dtype, shape)
        for outline, rank in zip(outlines, ranks, strict=True)
        for key, shape in WRITTEN.factor_entries(outline, rank)
    ]
    return found + [(extra.key, extra.dtype, extra.shape) for extra in extras]


def file_size(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> int:
    """Bytes of a file with these tensors."""
    data = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in tensors)
    return len(build_header(tensors, metadata)) + data


class AdapterWriter:
    """Takes the factors of one module after the other, then writes the file.

    The factors lie in `log`, where somebody may have put them before this run.
    """

    def __init__(self, folder: Path, dtype: str, metadata: dict[str, str], log: ResultLog) -> None:
        self._folder = folder
        self.log = log
        self.dtype = dtype
        self.metadata = metadata
        self._kept: dict[str, _Kept] = {}

    def add(self, outline: ModuleShape, rank: int, data: Bytes) -> None:
        """Put the `factor_bytes` of a module into the log, and take them from there."""
        self.take(outline, rank, self.log.put(outline.path, {}, [data]).pieces[0])

    def take(self, outline: ModuleShape, rank: int, data: Piece) -> None:
        """The `factor_bytes` of a module are these; a second time replaces the first."""
        if data.nbytes != rank * sum(outline.shape) * DTYPE_BITS[self.dtype] // 8:
            raise ValueError(f"{outline.path}: {data.nbytes} bytes are not factors of rank {rank}")
        self._kept[outline.path] = _Kept(outline, rank, data)

    def finish(
        self,
        outlines: Sequence[ModuleShape],
        ranks: Sequence[int],
        extras: Sequence[Extra],
        threads: int | None,
    ) -> None:
        """Write the file, each module with its rank: cut, or filled up with zeros."""
        producers: list[Callable[[], Bytes]] = [
            partial(
                self._stacked if outline.kind == "experts" else self._alone, outline, half, rank
            )
            for outline, rank in zip(outlines, ranks, strict=True)
            for half in "AB"
        ]
        tensors = tensors_of(outlines, ranks, self.dtype, extras)
        file = ShardWriter(self._folder / ADAPTER_MODEL, build_header(tensors, self.metadata))
        try:
            position = 0
            others = chain.from_iterable(extra.read() for extra in extras)
            for data in chain(computed(producers, threads), others):
                file.write(position, data.data)
                position += data.nbytes
        finally:
            file.close()

    def _alone(self, outline: ModuleShape, half: str, rank: int) -> Bytes:
        """The bytes of one factor at this rank, in the layout of PEFT."""
        rows = self._rows(self._kept[outline.path], half, rank)
        # Kept as [k, out], B is written as [out, k].
        return rows.reshape(-1).view(np.uint8) if half == "A" else _flat(rows.T)

    def _stacked(self, outline: ModuleShape, half: str, rank: int) -> Bytes:
        """The same of a stack: all its matrices are `[E·k, in]`, and `[out, k·E]` with
        the number of the matrix fastest. Those that are not kept are zero."""
        length = outline.shape[1 if half == "A" else 0]
        bits = _UNSIGNED[DTYPE_BITS[self.dtype] // 8]
        stack = np.zeros((outline.experts, rank, length), bits)
        for number in range(outline.experts):
            kept = self._kept.get(f"{outline.path}.{number}")
            if kept is not None:
                stack[number] = self._rows(kept, half, rank)
        return _flat(stack if half == "A" else stack.transpose(2, 1, 0))

    def _rows(self, kept: _Kept, half: str, rank: int) -> npt.NDArray[Any]:
        """`A [k, in]`, or `Bᵀ [k, out]`, at this rank."""
        out, width = kept.outline.shape
        size = DTYPE_BITS[self.dtype] // 8
        length, start = (width, 0) if half == "A" else (out, kept.rank * width)
        rows = np.zeros((rank, length * size), np.uint8)
        if kept.rank and rank:
            kept.data.read_into(rows[: kept.rank].data.cast("B"), start * size)
        return rows.view(_UNSIGNED[size])


def _flat(values: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def note_ranks(ranks: list[int]) -> Notice:
    """What programs make of different ranks. llama.cpp divides the config's alpha by each one."""
    text = (
        f"The modules have different ranks, {min(ranks)} to {max(ranks)}. llama.cpp and Ollama "
        "compute them with a wrong scale, without a word; SGLang, LoRAX, TGI and PEFT's hotswap "
        "refuse the adapter; PEFT and vLLM load it. Make it without patterns for one rank."
    )
    return Notice("ranks-differ", text)


def rounding_loss(b: Factor, a: Factor, data: Bytes, dtype: str) -> float:
    """‖B'A' − BA‖/‖BA‖ of the rounded factors in `data`, as `factor_bytes` made it.

    The difference is [δB B']·[A; δA], whose Gram matrices have nothing to cancel.
    """
    rounded = as_float32(data, dtype)
    near_a = rounded[: a.size].reshape(a.shape)
    near_b = rounded[a.size :].reshape(b.T.shape)
    rows_b = np.ascontiguousarray(b.T)
    size = float(np.sum(gram(rows_b) * gram(a)))
    off_b = gram(np.concatenate([near_b - rows_b, near_b]))
    off_a = gram(np.concatenate([a, near_a - a]))
    return math.sqrt(max(0.0, float(np.sum(off_b * off_a))) / size) if size > 0 else 0.0
