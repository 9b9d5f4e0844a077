"""A few values of an adapter or a model: whether it does anything, and what it may be a copy of.

All that is read here are some kilobytes, mostly; whole files are for `duplicates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors, LowRank
from loratool.cataloguing.entry import State
from loratool.storage.hashing import Hasher
from loratool.storage.tensors import FilePool, TensorInfo, block_elements
from loratool.storage.values import values_of

#: How many tensors are sampled, and how many bytes from the middle of each.
_TENSORS, _BYTES = 6, 1_024
#: Elements of a factor that are read first; of most, one of them is not zero.
_FIRST = 4_096

#: Fields of a config that do not change what the tensors do.
_OF_NAMES = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"}


def effect_of(adapter: Adapter, files: FilePool) -> State | None:
    """ "does-nothing" where one factor of every module is zero, "not-finite" where NaN or infinity
    were met, "" where it does something; None where that cannot be told by its factors alone.

    It reads until one module is found that does something, the beginnings of two factors mostly.
    """
    if adapter.replaced or adapter.token_rows or adapter.companions:
        return ""
    if adapter.functions or not adapter.modules or adapter.unknown:
        return None
    unsure = False
    for module in adapter.modules.values():
        found = _effect_of_module(module, files)
        if found in ("", "not-finite"):
            return found
        unsure = unsure or found is None
    return None if unsure else "does-nothing"


def _effect_of_module(module: Factors, files: FilePool) -> State | None:
    if not isinstance(module, LowRank) or module.stored or not module.is_sound:
        return None
    if module.magnitude is not None or module.bias is not None:
        return None
    if module.scale == 0:
        return "does-nothing"
    for factor in (module.b, module.a):
        found = _nonzero(factor, files)
        if found is None:
            return "not-finite"
        if not found:
            return "does-nothing"
    return ""


def _nonzero(info: TensorInfo, files: FilePool) -> bool | None:
    """Whether an element is not zero; None if the first such elements are no numbers."""
    values = values_of(info, files)
    low, high = 0, min(_FIRST, values.length)
    while low < high:
        part = values.floats(low, high)
        if part.any():
            return bool(np.isfinite(part).all()) or None
        low, high = high, min(values.length, high + block_elements())
    return False


def likeness(
    kind: str, tensors: Mapping[str, TensorInfo], beside: Sequence[object], files: FilePool
) -> str:
    """A digest that copies have in common: names, dtypes and shapes of all tensors, what stands
    `beside` them and changes what they do, and some bytes of a few."""
    hasher = Hasher()
    names = sorted(tensors)
    lines = [f"{n} {tensors[n].dtype} {tensors[n].shape}" for n in names]
    hasher.update("\n".join([kind, *map(repr, beside), *lines]).encode("utf-8", "replace"))
    dense = [tensors[n] for n in names if type(tensors[n]) is TensorInfo]
    dense = [info for info in dense if info.strides is None and info.nbytes and not info.zeros]
    for info in dense[:: max(1, len(dense) // _TENSORS)]:
        size = min(info.nbytes, _BYTES)
        raw = bytearray(size)
        files.read_into(info, (info.nbytes - size) // 2, memoryview(raw))
        hasher.update(bytes(raw))
    return hasher.text


def outline_of(adapter: Adapter) -> str:
    """What two adapters have in common whose deltas may be equal; "" where none is compared."""
    if not adapter.modules or adapter.functions:
        return ""
    hasher = Hasher()
    lines = sorted(f"{path} {module.shape}" for path, module in adapter.modules.items())
    hasher.update("\n".join(lines).encode("utf-8", "replace"))
    return hasher.text


def beside_tensors(adapter: Adapter) -> list[object]:
    """What changes what an adapter's tensors do: scales, and the config where that says more."""
    found: list[object] = [sorted((path, m.scale) for path, m in _scaled(adapter))]
    if adapter.functions or not adapter.is_read:
        found += [item for item in sorted(_settings(adapter.config)) if item[0] not in _OF_NAMES]
    return found


def _scaled(adapter: Adapter) -> Iterable[tuple[str, Factors]]:
    return ((path, m) for path, m in adapter.modules.items() if m.scale is not None)


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, repr(value)) for key, value in config.items()]
