"""An adapter in its own dialect again: other metadata, another dtype, and else the same bytes."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import low_rank
from loratool.adapters.dialects.writing import Asked, Draft, Fate
from loratool.adapters.experts import ExpertStack
from loratool.errors import AdapterError
from loratool.storage.computed import computed_tensor
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_MODEL
from loratool.storage.tensors import TensorInfo


def unchanged(
    adapter: Adapter, asked: Asked, metadata: dict[str, str], tidy: bool = False
) -> Draft:
    """The same adapter in one safetensors file, with `metadata` in its header.

    Keys and configs stay, but with `tidy` keys lose what training put around the model; so do all
    bytes, but for those of factors that get another dtype.
    """
    keys = adapter.proper_keys if tidy else {}
    if adapter.files[0].suffix != ".safetensors":
        raise AdapterError(
            f"{adapter.weights.name}: metadata and dtypes are changed in safetensors files.",
            "Say what it is to become: --to peft.",
        )
    name = adapter.weights.name if len(adapter.files) == 1 else ADAPTER_MODEL
    draft = Draft("safetensors", name, metadata={**adapter.metadata, **metadata}, is_copy=True)
    config = adapter.folder.path / ADAPTER_CONFIG
    if config.is_file():
        draft.copies[ADAPTER_CONFIG] = config
    factors = {t.name for m in adapter.modules.values() for t in m.parts.values()}
    for key, info in adapter.tensors.items():
        changed = _in_dtype(info, asked.dtype) if key in factors else info
        draft.tensors[keys.get(key, key)] = changed
    for path, module in adapter.modules.items():
        rounded = asked.dtype and any(t.dtype != asked.dtype for t in module.parts.values())
        piece = module if isinstance(module, ExpertStack) else low_rank(module)
        if rounded and piece is None:
            draft.refuse(path, f"{module.algorithm} has no factors that another dtype could be of")
        elif rounded and piece is not None:
            draft.pieces[path] = piece
            draft.fates.append(Fate(path, "rounded", "", module.rank, module.rank))
        else:  # all of its bytes are compared
            draft.fates.append(Fate(path, "exact", "", module.rank, module.rank))
    return draft


def _in_dtype(info: TensorInfo, dtype: str | None) -> TensorInfo:
    if dtype is None or info.dtype == dtype or not info.is_float:
        return info
    return computed_tensor(f"{info.name} ({dtype})", info.shape, [info], lambda v: v, dtype)
