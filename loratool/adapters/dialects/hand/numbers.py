"""Alpha, scale and rank as a hand-written state dict may hold them, in tensors of one element."""

from __future__ import annotations

import math

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.hand.names import Sorted
from loratool.adapters.told import Scaling, scaling
from loratool.errors import AdapterError
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import read_float32, read_raw

_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}


class Numbers:
    """What the file says of modules, by their paths; "" is all of them."""

    def __init__(self, adapter: Adapter, found: Sorted) -> None:
        self._adapter = adapter
        self._values: dict[str, dict[str, float]] = {}
        if found.numbers:
            adapter.fetch()
        for path, tensors in found.numbers.items():
            self._values[path] = {what: self._read(info) for what, info in tensors.items()}

    def _read(self, info: TensorInfo) -> float:
        value = math.nan
        if info.is_float:
            value = float(read_float32(info).reshape(-1)[0])
        elif info.dtype in _INTEGERS:
            value = float(read_raw(info).view(_INTEGERS[info.dtype])[0])
        if not math.isfinite(value) or not value:
            raise AdapterError(
                f"{info.name}: {value:g} is no scale, alpha or rank.",
                "Say --alpha or --scale, and remove it from the file.",
            )
        return value

    def scaling(self, path: str, rank: int) -> Scaling:
        values = self._values.get("", {}) | self._values.get(path, {})
        alpha, scale = values.get("alpha"), values.get("scale")
        told = self._adapter.told
        if values.get("rank", rank) != rank and not told.override:
            raise AdapterError(
                f"{path}: the file gives rank {values['rank']:g}, its factors have {rank}.",
                "Say which factors it is for with --adapter-rank, or add --override.",
            )
        if alpha is not None and scale is not None:
            if not math.isclose(alpha / rank, scale, rel_tol=1e-6) and not told.says_scale:
                raise AdapterError(
                    f"{path}: alpha {alpha:g} of the file and rank {rank} are scale "
                    f"{alpha / rank:g}, and the file also gives scale {scale:g}.",
                    "Say --alpha or --scale, with --override.",
                )
            alpha = None
        return scaling(told, rank, alpha=alpha, scale=scale, origin="alpha tensor", where=path)
