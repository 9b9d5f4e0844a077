"""What a user multiplies an adapter with: one number, or another one for ranges of layers.

As text: `0.7`, or `1,0.5@layers.0-3,0@layers.30-`. Each part is a number, and after an `@` where it
counts: the layers of these numbers, both included and without an end up to the last one, below a
component of this name, or below several (`decoder.layers`). A number without `@` is for all other
modules; where there is none, it is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from loratool.errors import UsageError

_RANGE = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*)"
    r"\.(?P<first>[0-9]{1,6})(?P<to>-(?P<last>[0-9]{1,6})?)?"
)
_NUMBER = re.compile("[0-9]{1,9}")
#: No model has more layers that matter one by one.
_MOST_RANGES = 1000
_GRAMMAR = (
    "Write a number, or numbers for ranges of layers: 0.7@layers.0-11,0.3@layers.12-, and for all "
    "other modules a number alone: 1,0.5@layers.0-3."
)


@dataclass(frozen=True)
class LayerRange:
    """Layers `first` to `last` (None: all that follow) below the component `name`."""

    name: str
    first: int
    last: int | None
    value: float

    def meets(self, path: str) -> bool:
        text, begin = f".{path}.", f".{self.name}."
        at = text.find(begin)
        while at >= 0:
            number = text[at + len(begin) :].partition(".")[0]
            layer = int(number) if _NUMBER.fullmatch(number) else -1
            if self.first <= layer and (self.last is None or layer <= self.last):
                return True
            at = text.find(begin, at + 1)
        return False

    def __str__(self) -> str:
        to = "" if self.last == self.first else f"-{'' if self.last is None else self.last}"
        return f"{_number(self.value)}@{self.name}.{self.first}{to}"


@dataclass(frozen=True)
class Weight:
    """The factor of an adapter: `value`, but for the layers of `ranges`."""

    value: float = 1.0
    ranges: tuple[LayerRange, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.ranges, key=lambda part: (part.name, part.first, part.value))
        object.__setattr__(self, "ranges", tuple(ordered))
        if not all(map(math.isfinite, self.values)):
            raise UsageError(f"The weight {self} is not finite.", "Give plain numbers.")
        if len(ordered) > _MOST_RANGES:
            raise UsageError(f"A weight has {len(ordered)} ranges of layers.", "Give fewer.")

    def at(self, path: str) -> float:
        """The factor of the module or parameter at a path."""
        return next((part.value for part in self.ranges if part.meets(path)), self.value)

    @property
    def values(self) -> tuple[float, ...]:
        """All factors that modules may have."""
        return (self.value, *(part.value for part in self.ranges))

    @property
    def is_one(self) -> bool:
        return all(value == 1 for value in self.values)

    def __bool__(self) -> bool:
        """Whether anything is left of the adapter."""
        return any(self.values)

    def __neg__(self) -> Weight:
        ranges = (LayerRange(p.name, p.first, p.last, -p.value) for p in self.ranges)
        return Weight(-self.value, tuple(ranges))

    def __str__(self) -> str:
        return ",".join([_number(self.value), *map(str, self.ranges)])

    @property
    def document(self) -> float | str:
        """As JSON has it: a number, or the text where there are ranges."""
        return str(self) if self.ranges else self.value

    def check(self, paths: Iterable[str], of: str) -> None:
        """Raise UsageError for a range that meets none of the modules at these paths, and where two
        meet one. `of` names the adapter."""
        known = list(paths)
        for part in self.ranges:
            if not any(part.meets(path) for path in known):
                raise UsageError(
                    f"--weight {part} meets no module of {of}.",
                    f"The paths look like {next(iter(known), '…')}.",
                )
        for path in known:
            both = [part for part in self.ranges if part.meets(path)]
            if len(both) > 1:
                raise UsageError(
                    f"--weight gives {path} two factors: {both[0]} and {both[1]}.",
                    "Let the ranges of layers not overlap.",
                )


#: The weight of an adapter that is not given one.
PLAIN = Weight()


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def parse_weight(given: float | str | Weight) -> Weight:
    """The weight that a number or a text says. Raises UsageError for what says none, and ValueError
    or TypeError for what is neither."""
    if isinstance(given, Weight):
        return given
    if not isinstance(given, str):
        return Weight(float(given))
    usual: float | None = None
    ranges = []
    for part in given.split(","):
        number, at, place = part.strip().partition("@")
        value = _parsed(number, given)
        if not at:
            if usual is not None:
                raise UsageError(f"--weight {given!r} has two numbers without layers.", _GRAMMAR)
            usual = value
            continue
        found = _RANGE.fullmatch(place)
        if found is None:
            raise UsageError(f"--weight {given!r}: {place!r} is no range of layers.", _GRAMMAR)
        first = int(found["first"])
        last = int(found["last"]) if found["last"] else None if found["to"] else first
        if last is not None and last < first:
            raise UsageError(f"--weight {given!r}: {place} ends before it begins.", _GRAMMAR)
        ranges.append(LayerRange(found["name"], first, last, value))
    return Weight(1.0 if usual is None else usual, tuple(ranges))


def _parsed(number: str, given: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(f"--weight {given!r}: {number!r} is no number.", _GRAMMAR) from None
