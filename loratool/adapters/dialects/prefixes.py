"""What training frameworks put into the names of a model's tensors, taken off again."""

from __future__ import annotations

import re

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = re.compile(r"^(module\.)+")

#: Where scripts put a model's state dict among other tables; no model has a part of such a name.
_TABLES = r"(?:model_state_dict|model_state|lora_state_dict|state_dict)\."
_TABLE = re.compile(f"({_TABLES})+")
#: What may stand before PEFT's own prefix, which a model that was wrapped twice has twice.
_BEFORE_PEFT = re.compile(
    rf"((?:{_TABLES}|model\.|module\.)*)base_model\.model\.((?:base_model\.model\.)*)"
)


def _is_wrapped(key: str) -> bool:
    """Whether a key may hold what `unwrapped` takes off: nearly none do, and there are many."""
    return "module." in key or "_orig_mod." in key


def unwrapped(key: str) -> str:
    """A key without what torch.compile, FSDP, checkpointing and DataParallel put into it."""
    if not _is_wrapped(key):
        return key
    return _PARALLEL.sub("", _WRAPPERS.sub("", key))


def without_peft(key: str) -> str:
    """A key that is unwrapped without PEFT's prefix and the tables of scripts before it."""
    found = _BEFORE_PEFT.match(key) or _TABLE.match(key)
    return key[found.end() :] if found else key


def wrappers_in(key: str) -> set[str]:
    """What of a key is neither of the model nor PEFT's usual prefix."""
    found: set[str] = set()
    plain = key
    if _is_wrapped(key):
        found |= {f"{name}." for name in _WRAPPERS.findall(key)}
        plain = _WRAPPERS.sub("", key)
    peft = _BEFORE_PEFT.match(plain)
    if peft is not None:
        inside = _PARALLEL.match(plain[peft.end() :])
        found |= {peft[1], "base_model.model. a second time" if peft[2] else ""}
        found |= {inside[0]} if inside else set()
    else:
        before = _PARALLEL.match(plain) or _TABLE.match(plain)
        found |= {before[0]} if before else set()
    return found - {""}
