"""Fields of a JSON file, each with the type that it must have.

A file is checked once, when it is read; whoever asks for a field afterwards need not look at its
type again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import FileError, LoraToolError

#: Longer values are cut where a message shows them.
_SHOWN = 60


@dataclass(frozen=True)
class FieldType:
    """What a field may hold: `fits` says it of a value, `wanted` in words."""

    wanted: str
    fits: Callable[[Any], bool]

    def __or__(self, other: FieldType) -> FieldType:
        return FieldType(
            f"{self.wanted} or {other.wanted}", lambda v: self.fits(v) or other.fits(v)
        )


def is_finite(value: Any) -> bool:
    """Whether a value is a number that float64 can hold, and no boolean."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and -sys.float_info.max <= value <= sys.float_info.max


def is_number(value: Any) -> bool:
    """Whether a value is a number whose square is one, too."""
    return is_finite(value) and -1e30 < value < 1e30


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, zero or above, that can count anything there is."""
    return type(value) is int and 0 <= value < 2**63


ABSENT = FieldType("nothing (null)", lambda v: v is None)
TEXT = FieldType("a text", lambda v: isinstance(v, str))
NUMBER = FieldType("a plain number", is_number)
FINITE = FieldType("a finite number", is_finite)
BOOLEAN = FieldType("true or false", lambda v: isinstance(v, bool))
#: What Python takes for true and false is true and false to whoever loads the file; a text is not:
#: "false" would be true.
FLAG = FieldType("true or false", lambda v: isinstance(v, bool) or (type(v) is int and v in (0, 1)))


def list_of(item: FieldType, wanted: str) -> FieldType:
    return FieldType(wanted, lambda v: isinstance(v, list) and all(map(item.fits, v)))


def mapping_to(item: FieldType, wanted: str) -> FieldType:
    return FieldType(
        wanted, lambda v: isinstance(v, dict) and all(item.fits(one) for one in v.values())
    )


ANYTHING = FieldType("anything", lambda v: True)
NAMES = list_of(TEXT, "a list of names")
TABLE = mapping_to(ANYTHING, "a table")
COUNT = FieldType("a whole number", is_count)
COUNTS = list_of(COUNT, "a list of whole numbers")


def check_fields(
    values: Mapping[str, Any],
    types: Mapping[str, FieldType],
    where: object,
    error: type[LoraToolError] = FileError,
) -> None:
    """Raise `error` for the first field of `types` that is there and has another type.

    `where` says in which file, and in which part of it, the fields are.
    """
    for field, kind in types.items():
        if field in values and not kind.fits(values[field]):
            raise error(
                f"{where}: {field} is {value_text(values[field])}; it must be {kind.wanted}.",
                "Correct it, or fetch the file again.",
            )


def value_text(value: Any) -> str:
    """A value of a JSON file for people: as it stands there, the beginning of it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def strict(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinity, which Python writes bare, become texts."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, list):
        return [strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
