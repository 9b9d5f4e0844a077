"""Regular expressions that cannot run away: what `re` matches, in a bounded number of steps.

`re` tries one way after the other, and a dozen characters of a hostile pattern keep it busy for
years. Here all ways are followed at once (Thompson, 1968, "Regular expression search algorithm"),
and the sets of states that come up are remembered, so that a character of a path mostly costs a
look into a table. The pattern is taken apart by the parser of `re` itself, so it means the same.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

#: What takes a pattern apart; Python has no public name for it.
_PARSER: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

#: What a state of a pattern, which stays in memory, costs in steps.
_STATE = 120
#: Sizes of all sets of states that are remembered for one pattern.
_MOST_REMEMBERED = 500_000

States = tuple[int, ...]
Fits = Callable[[str], bool]


class PatternError(Exception):
    """A pattern that is no regular expression, or one that is not matched here; says why."""


@dataclass
class Effort:
    """How much work may go into patterns; PatternError once it is used up."""

    left: int = 30_000_000

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise PatternError("it takes too long to match")


@dataclass(slots=True)
class _State:
    """One place in a pattern: where a character leads, or places that are reached without one."""

    fits: Fits | None = None
    at: Callable[[str, int], bool] | None = None
    next: list[int] = field(default_factory=list)


class Automaton:
    """A regular expression. Raises PatternError for what is none, as `re` does, for references to
    groups and options, and for one with too many states."""

    def __init__(self, pattern: str, effort: Effort) -> None:
        self._states: list[_State] = []
        self._looks_around = False
        self._effort = effort
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about patterns that may come to mean another set
                tree = _PARSER.parse(pattern)
            self._start = self._new()
            self._end = self._sequence(tree, self._start)
        except re.error as error:
            raise PatternError(str(error)) from None
        except (RecursionError, OverflowError, MemoryError):
            raise PatternError("it is nested too deeply, or repeats too often") from None
        if tree.state.flags & ~re.UNICODE:
            raise PatternError("it sets options")
        #: By states and surroundings: the states after it, and whether the pattern ends here.
        self._known: dict[tuple[States, str], tuple[States, bool]] = {}
        self._remembered = 0

    def matches(self, text: str) -> bool:
        """Whether the pattern matches at the beginning of `text`: `re.match(pattern, text)`."""
        states: States = (self._start,)
        self._effort.spend(len(text))
        for i, seen in enumerate(_surroundings(text)):
            step = self._known.get((states, seen))
            if step is None:
                step = self._step(states, self._end, text, i)
                if not self._looks_around:  # else a step depends on all of the text
                    self._remember((states, seen), step)
            states, ended = step
            if ended or not states:
                return ended
        return False

    def _fits_at(self, start: int, end: int, text: str, i: int, stop: int | None) -> bool:
        """Whether the states from `start` to `end` match at `i`: up to `stop`, if it is given."""
        states: States = (start,)
        for place in range(i, len(text) + 1):
            states, ended = self._step(states, end, text, place)
            if ended and stop in (None, place):
                return True
            if not states or place == stop:
                return False
        return False

    def _remember(self, key: tuple[States, str], step: tuple[States, bool]) -> None:
        self._remembered += len(key[0]) + len(step[0]) + 1
        if self._remembered > _MOST_REMEMBERED:
            self._known.clear()
            self._remembered = 0
        self._known[key] = step

    def _step(self, states: States, end: int, text: str, i: int) -> tuple[States, bool]:
        """The states after the character at `i`, and whether `end` is reached before it."""
        seen, waiting = set(states), list(states)
        after = set()
        while waiting:
            number = waiting.pop()
            state = self._states[number]
            if state.fits is not None:
                if i < len(text) and state.fits(text[i]):
                    after.update(state.next)
            elif state.at is None or state.at(text, i):
                new = [n for n in state.next if n not in seen]
                seen.update(new)
                waiting += new
        self._effort.spend(20 * len(seen))
        return tuple(sorted(after)), end in seen

    def _new(self) -> int:
        self._effort.spend(_STATE)
        self._states.append(_State())
        return len(self._states) - 1

    def _link(self, start: int, end: int) -> None:
        self._states[start].next.append(end)

    def _sequence(self, items: Iterable[tuple[Any, Any]], start: int) -> int:
        """Put the items of a parsed pattern behind `start`, a state that leads nowhere yet; the
        result is the state after them, which leads nowhere either."""
        for operation, value in items:
            start = self._add(str(operation), value, start)
        return start

    def _add(self, operation: str, value: Any, start: int) -> int:
        if operation == "BRANCH":
            end = self._new()
            for choice in value[1]:
                first = self._new()
                self._link(start, first)
                self._link(self._sequence(choice, first), end)
            return end
        if operation == "SUBPATTERN":
            _, added, removed, inside = value
            if added or removed:
                raise PatternError("it sets options")
            return self._sequence(inside, start)
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inside = value
            return self._repeat(least, most, inside, start)
        state = self._states[start]
        if operation == "AT":
            state.at = _AT[str(value)]
        elif operation in ("ASSERT", "ASSERT_NOT"):
            direction, inside = value
            state.at = self._look(direction, inside, operation == "ASSERT_NOT")
        else:
            state.fits = _letter(operation, value)
            if state.fits is None:
                raise PatternError("it has parts that are not read here, as references to groups")
        return self._after(start)

    def _look(self, direction: int, inside: Any, negated: bool) -> Callable[[str, int], bool]:
        """Whether what is inside matches ahead, or with direction -1 behind, where it has a width
        of its own."""
        self._looks_around = True
        start = self._new()
        end = self._sequence(inside, start)
        if direction > 0:
            return lambda text, i: self._fits_at(start, end, text, i, None) != negated
        least, most = inside.getwidth()
        if least != most:
            raise PatternError("look-behind requires fixed-width pattern")

        def behind(text: str, i: int) -> bool:
            return (i >= least and self._fits_at(start, end, text, i - least, i)) != negated

        return behind

    def _repeat(self, least: int, most: int, inside: Any, start: int) -> int:
        for _ in range(least):
            start = self._sequence(inside, self._after(start))
        end = self._after(start)
        if most == _PARSER.MAXREPEAT:
            first = self._after(start)
            self._link(self._sequence(inside, self._after(first)), first)
            self._link(first, end)
            return end
        for _ in range(most - least):
            start = self._sequence(inside, self._after(start))
            self._link(start, end)
        return end

    def _after(self, start: int) -> int:
        """A new state that is reached from `start` without a character."""
        end = self._new()
        self._link(start, end)
        return end


def _letter(operation: str, value: Any) -> Fits | None:
    """Whether a character fits an item that stands for one; None for any other item."""
    if operation == "LITERAL":
        return _is(value)
    if operation == "NOT_LITERAL":
        return chr(value).__ne__
    if operation == "ANY":
        return "\n".__ne__
    if operation == "RANGE":
        low, high = chr(value[0]), chr(value[1])
        return lambda letter: low <= letter <= high
    if operation == "CATEGORY":
        return _CATEGORIES[str(value)]
    if operation == "IN":
        negated = str(value[0][0]) == "NEGATE"
        choices = [_letter(str(name), inside) for name, inside in value[negated:]]
        return lambda letter: any(fits(letter) for fits in choices if fits) != negated
    return None


@lru_cache(maxsize=256)  # one for all states of a character: it would be half of a state's memory
def _is(code: int) -> Fits:
    return chr(code).__eq__


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _at_boundary(text: str, i: int) -> bool:
    return _is_word(text[i - 1 : i] if i else "") != _is_word(text[i : i + 1])


def _at_last(text: str, i: int) -> bool:
    """Where `$` matches: at the end, and before a line's end that is the last character."""
    return text[i:] in ("", "\n") if i >= len(text) - 1 else False


#: How the characters that re puts into classes are told.
_CATEGORIES: dict[str, Fits] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda letter: not letter.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda letter: not letter.isspace(),
    "CATEGORY_WORD": _is_word,
    "CATEGORY_NOT_WORD": lambda letter: not _is_word(letter),
}

_AT: dict[str, Callable[[str, int], bool]] = {
    "AT_BEGINNING": lambda text, i: i == 0,
    "AT_BEGINNING_STRING": lambda text, i: i == 0,
    "AT_END": _at_last,
    "AT_END_STRING": lambda text, i: i == len(text),
    "AT_BOUNDARY": _at_boundary,
    "AT_NON_BOUNDARY": lambda text, i: not _at_boundary(text, i),
}


@lru_cache(maxsize=16)  # many patterns look at one path after the other
def _surroundings(text: str) -> tuple[str, ...]:
    """For each place in a text, and its end, all that an item can see of it: the character, and
    whether it is the first or the last and what kind of character is before it."""
    last = len(text)
    return tuple(
        f"{text[i : i + 1]}{'^' * (i == 0)}{'$' * _at_last(text, i)}"
        f"{'w' * (i > 0 and _is_word(text[i - 1]))}{'' if i < last else '.'}"
        for i in range(last + 1)
    )
