"""Pickles read as data: plain values come out, and nothing in them runs.

A pickle is a program for a small machine with a stack. This is such a machine without the part that
imports and calls: it makes tables, lists, tuples, numbers, strings and constants, and what a table
of known names gives it, be that a constant or a `Call` of our own. It knows the opcodes that such
values are written with in protocols 1 to 5. Nothing in it recurses, keys of tables are plain, each
opcode makes at most one object, and their number is bounded; so time and memory follow the length
of the pickle, whatever it says.

Strings that are not UTF-8, huge numbers and keys that stand twice are refused, though Python takes
them. Sets are read as empty ones: no tensor can be in them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loratool.storage.bounded import LONGEST_NAME, Cursor, Malformed

#: Four times the 30 opcodes a tensor for the most tensors that `LONGEST_LIST` stands for.
_MOST_OPCODES = 20_000_000

#: Lists begun inside each other. Python gives up writing long before that.
_DEEPEST = 10_000

#: Bytes of the longest number; a state of a random generator has 17.
_LONGEST_NUMBER = 255

#: Characters of the longest number that is written out, which protocol 1 does.
_LONGEST_DIGITS = 1000

#: Entries of the longest tuple that can be a key.
_LONGEST_KEY = 16

_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


class Refused(Exception):
    """What a pickle asks for that plain values do not need."""


class Ordered(dict[Any, Any]):
    """What stands for an OrderedDict, and may have attributes, which are not read."""

    __slots__ = ()


class Call(NamedTuple):
    """A function that a pickle may call, with so many arguments."""

    run: Callable[..., Any]
    least: int
    most: int


def load(
    cursor: Cursor, known: Mapping[tuple[str, str], Any], persistent: Callable[[Any], Any]
) -> Any:
    """The value that the pickle at the cursor makes; the cursor is behind it afterwards.

    `known` has what a global name stands for, and `persistent` gives what a persistent id does.
    Raises Malformed for no well-formed pickle and Refused for one that needs more than that.
    """
    machine = _Machine(cursor, known, persistent)
    try:
        return machine.run()
    except IndexError:
        raise Malformed("it takes more from its stack than there is") from None
    except UnicodeDecodeError:
        raise Malformed("it has a string that is not UTF-8") from None


def add_entry(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Put a new entry into a table. Raises Malformed for a key that is odd or there already."""
    if type(key) is not str or len(key) > LONGEST_NAME:
        _check_key(key)
    if key in table:
        raise Malformed(f"a table has the key {str(key)[:80]!r} twice")
    table[key] = value


def _check_key(key: Any) -> None:
    parts = key if type(key) is tuple else (key,)
    if len(parts) > _LONGEST_KEY:
        raise Malformed(f"a table has a key of {len(parts):,} parts")
    for part in parts:
        if type(part) not in _PLAIN_KEYS:
            raise Malformed(f"a table has a key of the odd kind {type(part).__name__.strip('_')}")
        if type(part) is int and part.bit_length() > 64:
            raise Malformed("a table has a huge number as a key")
        if type(part) in (str, bytes) and len(part) > LONGEST_NAME:
            raise Malformed(f"a table has a key of {len(part):,} characters")


class _Machine:
    """The stack, the stacks that wait behind marks, and the memo of a pickle that is being read."""

    def __init__(
        self,
        cursor: Cursor,
        known: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.cursor = cursor
        self.known = known
        self.persistent = persistent
        self.stack: list[Any] = []
        self.waiting: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        take = self.cursor.take
        steps = _STEPS
        for _ in range(_MOST_OPCODES):
            code = take(1)
            step = steps.get(code)
            if step is not None:
                step(self)
            elif code == b".":
                return self.stack.pop()
            else:
                raise Malformed(f"it has the opcode {code.hex()}, which no plain pickle has")
        raise Malformed(f"it has more than {_MOST_OPCODES:,} opcodes")

    # --- plain values -------------------------------------------------------------------------

    def protocol(self) -> None:
        version = self.cursor.number(1)
        if version > 5:
            raise Malformed(f"its protocol is {version}, and there is none above 5")

    def frame(self) -> None:
        if self.cursor.number(8) > self.cursor.left:
            raise Malformed("it has a frame that is longer than the pickle")

    def number(self, width: int) -> None:
        self.stack.append(self.cursor.number(width))

    def signed(self, width: int) -> None:
        self.stack.append(int.from_bytes(self.cursor.take(width), "little", signed=True))

    def long(self, width: int) -> None:
        length = self.cursor.number(width)
        if length > _LONGEST_NUMBER:
            raise Malformed(f"it has a number of {length:,} bytes")
        self.signed(length)

    def digits(self) -> None:
        text = self.cursor.line(_LONGEST_DIGITS)
        if text in (b"00", b"01"):  # how False and True are written in protocol 1
            self.stack.append(text == b"01")
            return
        try:
            self.stack.append(int(text.removesuffix(b"L")))
        except ValueError:
            raise Malformed("it has a number that is none") from None

    def double(self) -> None:
        self.stack.append(struct.unpack(">d", self.cursor.take(8))[0])

    def text(self, width: int) -> None:
        cursor = self.cursor
        self.stack.append(cursor.take(cursor.number(width)).decode("utf-8"))

    def raw(self, width: int) -> None:
        self.stack.append(self.cursor.take(self.cursor.number(width)))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # --- tuples, lists, tables ----------------------------------------------------------------

    def mark(self) -> None:
        if len(self.waiting) == _DEEPEST:
            raise Malformed("its tables lie too deep inside each other")
        self.waiting.append(self.stack)
        self.stack = []

    def drop(self) -> None:
        """Take away the last value, or a mark with nothing on it."""
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.waiting.pop()
        return items

    def group(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Malformed("it appends to what is no list")
        target += items

    def fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise Malformed("it puts entries into what is no table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            add_entry(target, key, value)

    def add(self, _items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise Malformed("it adds to what is no set")

    def set_entry(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    # --- the memo -----------------------------------------------------------------------------

    def get(self, width: int) -> None:
        index = self.cursor.number(width)
        if index not in self.memo:
            raise Malformed("it takes from its memo what is not in there")
        self.stack.append(self.memo[index])

    def put(self, width: int) -> None:
        self.memo[self.cursor.number(width)] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # --- names and calls ----------------------------------------------------------------------

    def named(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Malformed("it asks for a name that is no text")
        if (module, name) not in self.known:
            raise Refused(f"it asks for {module[:100]}.{name[:100]}")
        self.stack.append(self.known[module, name])

    def global_name(self) -> None:
        module, name = self.cursor.line(LONGEST_NAME), self.cursor.line(LONGEST_NAME)
        self.named(module.decode("utf-8"), name.decode("utf-8"))

    def stacked_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(module, name)

    def call(self) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if type(what) is not Call or type(arguments) is not tuple:
            raise Malformed("it calls what is no function")
        if not what.least <= len(arguments) <= what.most:
            raise Malformed(f"it calls a function with {len(arguments):,} arguments")
        self.stack.append(what.run(*arguments))

    def build(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not Ordered:
            raise Refused("it changes a value after it was made")

    def persist(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _with(method: Callable[[_Machine, Any], None], value: Any) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, value)


def _of_marked(method: Callable[[_Machine, list[Any]], None]) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, machine.marked())


#: By opcode; the names that Python's pickle.py has for them stand behind those that need it.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"N": _with(_Machine.push, None),
    b"\x88": _with(_Machine.push, True),
    b"\x89": _with(_Machine.push, False),
    b"K": _with(_Machine.number, 1),
    b"M": _with(_Machine.number, 2),
    b"J": _with(_Machine.signed, 4),
    b"\x8a": _with(_Machine.long, 1),
    b"\x8b": _with(_Machine.long, 4),
    b"I": _Machine.digits,
    b"L": _Machine.digits,
    b"G": _Machine.double,
    b"\x8c": _with(_Machine.text, 1),
    b"X": _with(_Machine.text, 4),
    b"\x8d": _with(_Machine.text, 8),
    b"U": _with(_Machine.text, 1),  # SHORT_BINSTRING and BINSTRING, the strings of Python 2
    b"T": _with(_Machine.text, 4),
    b"C": _with(_Machine.raw, 1),
    b"B": _with(_Machine.raw, 4),
    b"\x8e": _with(_Machine.raw, 8),
    b"\x96": _with(_Machine.raw, 8),  # BYTEARRAY8
    b"(": _Machine.mark,
    b"0": _Machine.drop,
    b"1": _of_marked(lambda _machine, _items: None),  # POP_MARK
    b")": _with(_Machine.push, ()),
    b"t": _of_marked(lambda machine, items: machine.push(tuple(items))),
    b"\x85": _with(_Machine.group, 1),
    b"\x86": _with(_Machine.group, 2),
    b"\x87": _with(_Machine.group, 3),
    b"]": lambda machine: machine.push([]),
    b"a": lambda machine: machine.append([machine.stack.pop()]),
    b"e": _of_marked(_Machine.append),
    b"}": lambda machine: machine.push({}),
    b"s": _Machine.set_entry,
    b"u": _of_marked(_Machine.fill),
    b"\x8f": _with(_Machine.push, set[Any]()),  # EMPTY_SET, which nothing is ever put into
    b"\x90": _of_marked(_Machine.add),
    b"\x91": _of_marked(lambda machine, _items: machine.push(frozenset())),
    b"h": _with(_Machine.get, 1),
    b"j": _with(_Machine.get, 4),
    b"q": _with(_Machine.put, 1),
    b"r": _with(_Machine.put, 4),
    b"\x94": _Machine.memoize,
    b"c": _Machine.global_name,
    b"\x93": _Machine.stacked_name,
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.persist,
}
