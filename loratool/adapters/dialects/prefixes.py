"""What training frameworks put into the names of a model's tensors, taken off again."""

from __future__ import annotations

import re

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"^(module\.)+")


def unwrapped(key: str) -> str:
    """A key without what torch.compile, FSDP, checkpointing and DataParallel put into it."""
    if "module." not in key and "_orig_mod." not in key:
        return key  # nearly all, and models have very many
    return _PARALLEL.sub("", _WRAPPERS.sub("", key))
