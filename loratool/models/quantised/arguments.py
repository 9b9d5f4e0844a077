"""What config.json says of how weights are quantised: bits, groups and blocks, checked.

The tensors of a module show most of it; what they leave open (where the last block of a row ends)
stands in the config, of transformers' `fp8` for the whole model, of compressed-tensors and ModelOpt
by groups of modules. Which group a module is in, its shapes show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loratool.errors import BaseError
from loratool.models.quantised.module import Module, Quantisation
from loratool.storage.fields import ABSENT, NAMES, TABLE, FieldType, check_fields, mapping_to

_SIZE = FieldType("a whole number above 0", lambda v: type(v) is int and 0 < v < 1 << 31)
_WHOLE_ROW = FieldType("-1", lambda v: type(v) is int and v == -1)
_BITS = FieldType("a whole number from 1 to 16", lambda v: type(v) is int and 0 < v <= 16)
_BLOCK = FieldType(
    "a list of two whole numbers above 0",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(_SIZE.fits, v)),
)
#: As compressed-tensors once wrote it.
_BLOCK_TEXT = FieldType(
    'a text like "128x128"',
    lambda v: isinstance(v, str) and re.fullmatch("[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", v) is not None,
)
_OF_MODELS = {"weight_block_size": _BLOCK | ABSENT, "config_groups": TABLE | ABSENT}
#: A group may be the names of its modules alone, with no numbers.
_OF_ALL_GROUPS = mapping_to(TABLE | NAMES, "a table of groups")
_OF_GROUPS = {"weights": TABLE | ABSENT}
_OF_WEIGHTS = {
    "num_bits": _BITS | ABSENT, "group_size": _SIZE | _WHOLE_ROW | ABSENT,
    "block_structure": _BLOCK | _BLOCK_TEXT | ABSENT,
}  # fmt: skip


@dataclass(frozen=True)
class WeightArguments:
    """How some weights of a model are quantised, as its config has it.

    `group` is how many values of a row share a scale, None for all of them or none said; `block`
    rows and columns that do.
    """

    bits: int | None = None
    group: int | None = None
    block: tuple[int, int] | None = None


def weight_arguments(module: Module) -> tuple[WeightArguments, ...]:
    """What the config of a module's model says, one entry for each way that it names.

    Raises BaseError for fields of a wrong type, and for sizes that can be none.
    """
    return _arguments(module.settings, f"{module.base.label}: config.json")


@lru_cache(maxsize=4)
def _arguments(settings: Quantisation, where: str) -> tuple[WeightArguments, ...]:
    place = f"{where}, {settings.where}" if settings.where else where
    check_fields(settings.table, _OF_MODELS, place, BaseError)
    block = settings.table.get("weight_block_size")
    found = [WeightArguments(8, None, _pair(block))] if block else []
    groups: dict[str, Any] = settings.table.get("config_groups") or {}
    check_fields({"config_groups": groups}, {"config_groups": _OF_ALL_GROUPS}, place, BaseError)
    for name, group in groups.items():
        inside = f"{place}.config_groups.{name}"
        weights: dict[str, Any] = {}
        if isinstance(group, dict):
            check_fields(group, _OF_GROUPS, inside, BaseError)
            weights = group.get("weights") or {}
        check_fields(weights, _OF_WEIGHTS, f"{inside}.weights", BaseError)
        if weights:
            size, block = weights.get("group_size"), weights.get("block_structure")
            size = None if size == -1 else size
            pair = _pair(block) if block else None
            found.append(WeightArguments(weights.get("num_bits"), size, pair))
    return tuple(dict.fromkeys(found))


def _pair(block: Any) -> tuple[int, int]:
    rows, columns = map(int, block.split("x") if isinstance(block, str) else block)
    return rows, columns
