"""The YAML at the beginning of a card: found, read within bounds, and refused beyond them.

A card comes from anywhere. YAML can name a value again and again until a few lines mean billions
of values, nest without end, or hold a number that takes hours to convert. So the text is gone
through as events first, which builds nothing.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from loratool.errors import FileError
from loratool.publishing.cards.markdown import one_line

#: Where the block is; group 2 is the YAML. As huggingface_hub has it, but with no other line breaks
#: than these, in linear time.
BLOCK = re.compile(r"\A(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|\Z))")

#: Characters of YAML, and values in it with every alias written out. The longest cards, which list
#: the results of hundreds of tests, have a third of each.
_LONGEST = 1_000_000
_VALUES = 100_000
_DEEPEST = 50
#: Characters of a number or a date.
_LONGEST_NUMBER = 100
_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


def read_metadata(text: str) -> dict[Any, Any]:
    """The values of a card's YAML, {} without any. Raises FileError for YAML out of bounds."""
    found = BLOCK.search(text.removeprefix("\ufeff"))
    return read_yaml(found[2]) if found else {}


def read_yaml(block: str) -> dict[Any, Any]:
    """The values of a YAML block. Raises FileError for what is out of bounds, or no mapping."""
    yaml = import_module("yaml")  # it has no types
    try:
        _check(block)
        values = yaml.load(block, Loader=_loader())
        if not isinstance(values, dict | None):
            raise ValueError("it is no mapping of keys to values")
        return values or {}
    except Exception as error:  # its constructors raise whatever comes of odd values
        raise FileError(
            f"README.md: the YAML at its beginning is not valid ({_reason(error)}).",
            "Repair it, or remove it; a new one is made then.",
        ) from None


def _reason(error: Exception) -> str:
    """What a YAML library says, which has lines of its own and a name for the text, in one."""
    text = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
    return one_line(text or type(error).__name__)[:300]


def _loader() -> Any:
    """The safe loader, which makes no objects; in C where there is one."""
    yaml = import_module("yaml")
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Open:
    """A list or a mapping that has begun: its values so far, aliases written out."""

    def __init__(self, event: Any, yaml: Any) -> None:
        self.anchor, self.size, self.count = event.anchor, 1, 0
        self.is_mapping = isinstance(event, yaml.MappingStartEvent)
        self.keys: set[str] = set()


def _check(block: str) -> None:
    """Raise ValueError where values would be too many, too deep, too long, twice or without end."""
    if len(block) > _LONGEST:
        raise ValueError(f"{len(block):,} characters, more than {_LONGEST:,}")
    yaml = import_module("yaml")
    resolver = yaml.resolver.Resolver()
    sizes: dict[str, int] = {}
    opened: list[_Open] = []
    for event in yaml.parse(block, Loader=_loader()):
        size = 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} is not known, or lies in itself")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Open(event, yaml))
            if len(opened) > _DEEPEST:
                raise ValueError(f"nested more than {_DEEPEST} deep")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            size = closed.size
            if closed.anchor:
                sizes[closed.anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, opened, resolver, yaml)
            if event.anchor:
                sizes[event.anchor] = 1
        else:
            continue
        if opened:
            opened[-1].count += 1
            opened[-1].size += size
            size = opened[-1].size
        if size > _VALUES:
            raise ValueError(f"more than {_VALUES:,} values, with aliases written out")


def _check_scalar(event: Any, opened: list[_Open], resolver: Any, yaml: Any) -> None:
    tag = event.tag or resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
    if tag in _NUMBERS and len(event.value) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(event.value):,} characters")
    if opened and opened[-1].is_mapping and opened[-1].count % 2 == 0 and event.value != "<<":
        # The Hub refuses a key that comes twice; PyYAML takes the last.
        if event.value in opened[-1].keys:
            raise ValueError(f"the key {event.value[:80]!a} comes twice")
        opened[-1].keys.add(event.value)
