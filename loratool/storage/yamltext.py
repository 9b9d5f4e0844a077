"""YAML that strangers wrote, read within bounds and refused beyond them.

YAML can name a value again and again until a few lines mean billions of values, nest without end,
or hold a number that takes hours to convert. So the text is gone through as events first, which
builds nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from loratool.errors import FileError
from loratool.storage.bounded import open_regular

#: Characters of YAML, and values in it with every alias written out. The longest cards of models,
#: which list the results of hundreds of tests, have a third of each.
_LONGEST = 1_000_000
_VALUES = 100_000
_DEEPEST = 50
#: Characters of a number or a date.
_LONGEST_NUMBER = 100
_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


def load_yaml(text: str) -> dict[Any, Any]:
    """The mapping in a YAML text, {} without any. Raises ValueError, in one line, for what is out
    of bounds, or no mapping."""
    yaml = import_module("yaml")  # it has no types
    try:
        _check(text)
        values = yaml.load(text, Loader=_loader())
        if not isinstance(values, dict | None):
            raise ValueError("it is no mapping of keys to values")
        return values or {}
    except Exception as error:  # its constructors raise whatever comes of odd values
        raise ValueError(_reason(error)) from None


def read_yaml_file(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises FileError for anything else."""
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size > 4 * _LONGEST:
                raise ValueError(f"more than {4 * _LONGEST:,} bytes")
            return load_yaml(stream.read(4 * _LONGEST).decode("utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not valid YAML ({error}).", "Repair or fetch it again.") from None


def _reason(error: Exception) -> str:
    """What a YAML library says, which has lines of its own and a name for the text, in one."""
    text = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
    return (text or type(error).__name__)[:300]


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


def _check(text: str) -> None:
    """Raise ValueError where values would be too many, too deep, too long, twice or without end."""
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text):,} characters, more than {_LONGEST:,}")
    yaml = import_module("yaml")
    resolver = yaml.resolver.Resolver()
    sizes: dict[str, int] = {}
    opened: list[_Open] = []
    for event in yaml.parse(text, Loader=_loader()):
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


def dump_yaml(values: dict[str, Any]) -> str:
    """A mapping as YAML, in its order."""
    text: str = import_module("yaml").safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
