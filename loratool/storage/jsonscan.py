"""A JSON text read member by member, so that what is wrong is met before it has filled the memory.

A parser makes objects of all it reads, up to twenty times as large as their text, and only then can
anybody look at them. Whoever knows what each member must look like scans instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from loratool.storage.bounded import Malformed

_BLANK = " \t\n\r"
_BLANKS = re.compile(r"[ \t\n\r]*")


class Scanner:
    """Reads one JSON value from the beginning of a text to its end. Raises Malformed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def next(self) -> str:
        """The next character that is not blank, which stays to be read; "" at the end."""
        mark = self._text[self._at : self._at + 1]
        if mark not in _BLANK:
            return mark
        self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
        return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """The names in an object, in order. After each one its value is to be read."""
        self._expect("{")
        if self.next() == "}":
            self._at += 1
            return
        while True:
            name = self.string()
            self._expect(":")
            yield name
            if self.next() == "}":
                self._at += 1
                return
            self._expect(",")

    def string(self) -> str:
        if self.next() != '"':
            raise self._wrong("no string")
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
            text = str(value)
            if not text.isascii():
                # JSON can spell half a surrogate pair, which no file name or terminal can hold.
                text.encode("utf-8")
        except UnicodeError:
            raise self._wrong("half a character") from None
        except ValueError:
            raise self._wrong("a string without an end") from None
        return text

    def value(self, longest: int) -> Any:
        """Any value with a text of at most so many characters. No name may stand in it twice."""
        self.next()
        piece = self._text[self._at : self._at + longest]
        try:
            value, length = _DECODER.raw_decode(piece)
        except (ValueError, RecursionError):
            what = "a value that is none" if len(piece) < longest else "a value that is too long"
            raise self._wrong(what) from None
        self._at += length
        return value

    def end(self) -> None:
        if self.next():
            raise self._wrong("something behind its end")

    def _expect(self, mark: str) -> None:
        if self.next() != mark:
            raise self._wrong(f"no {mark!r}")
        self._at += 1

    def _wrong(self, what: str) -> Malformed:
        return Malformed(f"it is not JSON: {what} at character {self._at:,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Malformed(f"it names {name[:80]!r} twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
