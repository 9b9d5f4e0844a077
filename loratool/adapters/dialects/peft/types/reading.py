"""The tensors of an adapter of one of PEFT's other types, sorted into modules and made factors of.

What is not of the type itself (modules saved whole, biases, trained token rows) lies in the file as
beside LoRA.
"""

from __future__ import annotations

import re
from collections import defaultdict

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.config import unknown_fields
from loratool.adapters.dialects.peft.expectations import note_expectations
from loratool.adapters.dialects.peft.names import plain_path
from loratool.adapters.dialects.peft.types.method import (
    PeftContents,
    PeftMethod,
    PeftModule,
    Replacement,
    Trouble,
)
from loratool.adapters.dialects.peft.whole import (
    claim,
    note_lost_originals,
    note_several,
    place_saved_or_rows,
    place_whole,
)
from loratool.adapters.dialects.troubles import EMPTY, INTEGERS, refuse_empty, refuse_modules
from loratool.adapters.functions import RowFunction
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.storage.tensors import TensorInfo

#: Where tensors lie that all modules share.
_SHARED = "base_model"

#: By code, what is wrong with modules, to follow "1 module".
_TROUBLES = {
    "half-a-pair": "lacks a tensor, so nothing can be computed",
    "rank-mismatch": "has another rank than the config gives; correct it there",
    "pair-mismatch": "has tensors whose shapes do not belong together",
    "needs-base": "has factors that depend on the base, which is not given. Give it: --base",
    "peft-options": "has no merged form that is known",
    "zero3-placeholder": EMPTY,
    "quantised-factors": INTEGERS,
}
_PACKED = ("F8", "F6", "F4")


def fill_typed(adapter: Adapter, method: PeftMethod, base: Checkpoint | None) -> None:
    """Sort the tensors of an adapter of this type into modules, functions and whole tensors.

    Fills `adapter` in place. What cannot be merged becomes a notice with `refused` set.
    """
    slots = _Slots(method)
    names = slots.names
    for key, info in adapter.tensors.items():
        path = plain_path(key)
        if place_saved_or_rows(adapter, key, path, info, names):
            continue
        found = slots.place_of(path)
        if found is not None:
            claim(adapter, *found, info)
        elif slots.is_like(path) or "lora_" in path:
            adapter.unknown.append(key)
        else:
            place_whole(adapter, key, path, info)
    note_several(adapter, names)
    adapter.notices += _config_notices(adapter, method)
    note_lost_originals(adapter)
    troubles = _build_modules(adapter, method, slots.found, base)
    if adapter.functions and adapter.told.says_scale:
        raise AdapterError(
            f"{adapter.label}: {method.words} is no sum, so it has no scale.",
            "Omit --alpha and --scale.",
        )
    for code, places in troubles.items():
        refuse_modules(adapter, code, _TROUBLES[code], places)
    refuse_empty(adapter)
    broken = {place.partition(":")[0] for places in troubles.values() for place in places}
    note_expectations(adapter, broken)


class _Slots:
    """Sorts the keys of one type's tensors by module and slot."""

    def __init__(self, method: PeftMethod) -> None:
        self._pattern = re.compile(
            rf"(?P<path>.+?)\.(?P<slot>{'|'.join(method.slots)})(?:\.(?P<name>[^.]+))??"
            rf"(?P<rest>{method.rest})(?:\.weight)?"
        )
        self._like = re.compile(rf"(.*\.)?({'|'.join(method.slots)})(\..*)?")
        self.found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        #: The names of adapters that keys of a raw state dict have.
        self.names: set[str] = set()

    def place_of(self, path: str) -> tuple[dict[str, TensorInfo], str] | None:
        """The tensors of the module that a key is of, and its slot there."""
        match = self._pattern.fullmatch(path)
        if match is None:
            return None
        if match["name"]:
            self.names.add(match["name"])
        return self.found[match["path"]], match["slot"] + match["rest"]

    def is_like(self, path: str) -> bool:
        """Whether a key has the name of a slot, and nothing behind it that is known."""
        return self._like.fullmatch(path) is not None


def _config_notices(adapter: Adapter, method: PeftMethod) -> list[Notice]:
    """What in a config of this type stands in the way of a merge, or is not known."""
    config = adapter.config
    notices = [
        Notice(field.replace("_", "-"), f"{field} is set: {reason}.", ADAPTER_CONFIG, refused=True)
        for field, reason in method.refused.items()
        if config.get(field)
    ]
    notices += [Notice(code, text) for code, text in method.warnings.items()]
    return notices + unknown_fields(config, method.known)


def _build_modules(
    adapter: Adapter,
    method: PeftMethod,
    found: dict[str, dict[str, TensorInfo]],
    base: Checkpoint | None,
) -> dict[str, list[str]]:
    """Fill the adapter with what the type makes of each module's tensors.

    Returns what is wrong with modules, by the code of a notice.
    """
    shared = found.pop(_SHARED, {})
    contents = PeftContents(adapter, found, shared, base)
    if shared and not found:
        text = (
            "The file has only what the modules share; which part each of them has, PEFT draws "
            "from a seed and the order of the model's modules. Save it with its indices."
        )
        adapter.notices.append(Notice("peft-options", text, ADAPTER_CONFIG, refused=True))
    troubles: dict[str, list[str]] = defaultdict(list)
    for path, tensors in found.items():
        module = PeftModule(path, tensors, contents)
        try:
            _check({**tensors, **shared})
            for made in method.make(module):
                if isinstance(made, Replacement):
                    claim(adapter, adapter.replaced, made.name, made.info)
                elif isinstance(made, RowFunction):
                    adapter.functions[made.weight_name] = made
                else:
                    adapter.modules[path] = made
        except Trouble as trouble:
            troubles[trouble.code].append(f"{path}: {trouble}")
    return troubles


def _check(tensors: dict[str, TensorInfo]) -> None:
    for slot, info in tensors.items():
        if 0 in info.shape:
            raise Trouble("zero3-placeholder", f"{slot} {list(info.shape)}")
        if info.dtype.startswith(_PACKED):
            raise Trouble("quantised-factors", f"{slot} is {info.dtype}")
