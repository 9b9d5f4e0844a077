"""What lies in a PEFT file beside factors, whatever their type: whole tensors and token rows.

Whole are the modules of modules_to_save, trained biases and embeddings.
"""

from __future__ import annotations

import re
from typing import Any

from loratool.adapters.adapter import Adapter, TokenRows
from loratool.adapters.dialects.peft.names import plain_path
from loratool.notices import Notice
from loratool.storage.fields import value_text
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_bytes
from loratool.words import counted

_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<param>.+)")
_ROWS = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?P<name>[^.]+))?")


def place_saved_or_rows(
    adapter: Adapter, key: str, path: str, info: TensorInfo, names: set[str]
) -> bool:
    """Sort a tensor of modules_to_save or trained token rows; False for one that is neither.

    The names of adapters in keys of a raw state dict are added to `names`.
    """
    if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in adapter.tensors:
        # bias="all" saves the biases of a saved module a second time, without the adapter's name.
        claim(adapter, adapter.replaced, path.replace(".modules_to_save.", "."), info)
        return True
    saved, rows = _SAVED.fullmatch(path), _ROWS.fullmatch(path)
    for match in (saved, rows):
        if match is not None and match["name"]:
            names.add(match["name"])
    if saved is not None:
        claim(adapter, adapter.replaced, f"{saved['path']}.{saved['param']}", info)
    elif rows is not None and rows["path"] in adapter.token_rows:
        first = adapter.token_rows[rows["path"]].rows
        claim(adapter, {"": first}, "", info)
    elif rows is not None:
        place = rows["path"]
        adapter.token_rows[place] = TokenRows(place, _token_indices(adapter, place, info), info)
    return saved is not None or rows is not None


def place_whole(adapter: Adapter, key: str, path: str, info: TensorInfo) -> None:
    """Sort a tensor that is saved under the name of the model's own."""
    if ".original_module." in path:
        # The frozen original beside a saved copy; the copy is what the model computes with.
        adapter.inert.append(key)
        return
    # `base_layer` is the name PEFT gives to the wrapped original, so the tensor means the original
    # itself.
    name = re.sub(r"(\.token_adapter)?(\.base_layer)+\.", ".", path)
    claim(adapter, adapter.replaced, name, info)


def claim(adapter: Adapter, table: dict[str, TensorInfo], slot: str, info: TensorInfo) -> None:
    """Put a tensor in its place; a second one for the same place is never dropped in silence.

    A copy of the same values is harmless: PEFT's `bias="all"` saves the biases of saved modules
    under two names.
    """
    taken = table.setdefault(slot, info)
    if taken is info:
        return
    if (taken.dtype, taken.shape) == (info.dtype, info.shape):
        adapter.fetch()
    (adapter.inert if same_bytes(taken, info) else adapter.unknown).append(info.name)


def note_lost_originals(adapter: Adapter) -> None:
    """Call frozen originals unknown whose trained copy is not in the file."""
    adapter.unknown += [
        key
        for key in adapter.inert
        if ".original_module." in key
        and plain_path(key).replace(".original_module.", ".") not in adapter.replaced
    ]


def note_several(adapter: Adapter, names: set[str]) -> None:
    """Refuse a file whose keys have the names of several adapters."""
    if len(names) > 1:
        adapter.notices.append(
            Notice(
                "several-adapters",
                f"The file holds {len(names)} adapters: {', '.join(sorted(names))}. "
                "Save the one you want with PEFT's save_pretrained(selected_adapters=[...]).",
                refused=True,
            )
        )


def _token_indices(adapter: Adapter, path: str, rows: TensorInfo) -> tuple[int, ...]:
    setting: Any = adapter.config.get("trainable_token_indices")
    if adapter.peft_type == "TRAINABLE_TOKENS":
        setting = adapter.config.get("token_indices")
    if isinstance(setting, dict):
        setting = next((v for k, v in setting.items() if path == k or path.endswith(f".{k}")), None)
    count = rows.shape[0] if len(rows.shape) == 2 else 0
    if not setting or len(setting) != count or len(set(setting)) != count:
        adapter.notices.append(
            Notice(
                "token-indices",
                f"{counted(count, 'trained token row')}, but trainable_token_indices of the config "
                f"is {value_text(setting)}.",
                path,
                refused=True,
            )
        )
        return ()
    return tuple(setting)
