"""Keys of rank_pattern and alpha_pattern: which module paths they mean, as PEFT reads them.

A key is a regular expression that must match the whole path, or an end of it after a dot
(`get_pattern_key` in peft/utils/other.py: `re.match(rf"(.*\\.)?({key})$", path)`). Most keys are
paths. A path's ends are looked up among those, so that tables of thousands cost no time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loratool.adapters.dialects.peft.automaton import Automaton, Effort, PatternError
from loratool.errors import AdapterError
from loratool.paths import dotted_ends
from loratool.storage.fields import value_text
from loratool.storage.filenames import ADAPTER_CONFIG

#: A key without operators: letters, digits, `_`, `-`, dots (any character) and escaped characters.
#: Behind `^` it means a whole path; `$` says what is said of every key.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])+\$?", re.ASCII)
_ANY = "\0"

#: Where a key has dots, which stand for any character.
Dots = tuple[int, ...]
#: Keys without operators by their lengths and dots, and the number of each.
Plain = dict[int, dict[Dots, dict[str, int]]]


class PathPatterns:
    """A table of values by pattern. Raises AdapterError for a key that is no regular expression,
    or one that is not matched here."""

    def __init__(self, table: Mapping[str, float], field: str, effort: Effort) -> None:
        self._values = list(table.values())
        self._keys = list(table)
        self._field, self._effort = field, effort
        self._of_ends: Plain = defaultdict(lambda: defaultdict(dict))
        self._of_paths: Plain = defaultdict(lambda: defaultdict(dict))
        self._others: list[tuple[int, Automaton]] = []
        for number, key in enumerate(self._keys):
            if _PLAIN.fullmatch(key):
                self._add_plain(number, key)
            else:
                self._others.append((number, self._automaton(number)))

    def _add_plain(self, number: int, key: str) -> None:
        table = self._of_paths if key.startswith("^") else self._of_ends
        key = key.removeprefix("^").removesuffix("$")
        text = re.sub(r"\\(.)|\.", lambda found: found[1] or _ANY, key)
        dots = tuple(i for i, letter in enumerate(text) if letter == _ANY)
        table[len(text)][dots].setdefault(text, number)

    def _automaton(self, number: int) -> Automaton:
        with self._named(number):
            return Automaton(rf"(.*\.)?({self._keys[number]})$", self._effort)

    def first(self, path: str, default: float) -> float:
        """The value of the first key in the table's order that means `path`, or the default."""
        number = self._first(path) if self._keys else None
        return default if number is None else self._values[number]

    def _first(self, path: str) -> int | None:
        plain = min(self._plain_matches(path), default=None)
        for number, automaton in self._others:
            if plain is not None and number > plain:
                break
            with self._named(number):
                if automaton.matches(path):
                    return number
        return plain

    def _plain_matches(self, path: str) -> Iterator[int]:
        """The keys without operators that mean a path."""
        if "\n" in path:  # which a dot does not stand for: no name has it but to do harm
            for number, key in enumerate(self._keys):
                if _PLAIN.fullmatch(key) and self._automaton(number).matches(path):
                    yield number
            return
        yield from self._found(self._of_paths, path)
        for end in dotted_ends(path):
            yield from self._found(self._of_ends, end)

    def _found(self, table: Plain, text: str) -> Iterator[int]:
        for dots, keys in table.get(len(text), {}).items():
            self._effort.spend(len(text))
            letters = list(text)
            for i in dots:
                letters[i] = _ANY
            if (found := keys.get("".join(letters))) is not None:
                yield found

    @contextmanager
    def _named(self, number: int) -> Iterator[None]:
        """Errors of a pattern as errors of this key."""
        try:
            yield
        except (PatternError, RecursionError) as error:
            raise AdapterError(
                f"{ADAPTER_CONFIG}: {self._field} has the key {value_text(self._keys[number])}, "
                f"which cannot be used as a regular expression: {error}.",
                "PEFT reads these keys as regular expressions; correct it, or write the paths of "
                "the modules instead.",
            ) from None
