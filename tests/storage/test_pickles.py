"""Pickles read as data: the values of plain ones, and a reason for all others, at once."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import struct
import tracemalloc
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.storage import pickles
from loratool.storage.bounded import Cursor, Malformed
from loratool.storage.pickles import Refused, load
from loratool.storage.statedict import Descriptions

P = b"\x80\x02"


def read(data: bytes) -> Any:
    """What the machine makes of a pickle, with the names that torch files may use."""
    described = Descriptions()
    return load(Cursor(io.BytesIO(data), 0, len(data)), described.known, described.persistent)


def reason(data: bytes) -> str:
    """Why a pickle is not read."""
    with pytest.raises((Malformed, Refused)) as caught:
        read(data)
    assert 5 < len(str(caught.value)) < 400
    return str(caught.value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 2000), 1 << 2000)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(value=PLAIN, protocol=st.integers(3, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    """What Python pickles of tables, lists, numbers and strings is read as it was."""
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(1, 6))
def test_shared_and_recursive_values_come_back(protocol: int) -> None:
    """Lists that hold themselves, tuples in them and values that are shared are so again."""
    shared: list[Any] = [1]
    value: dict[str, Any] = {"a": shared, "b": (shared, ())}
    value["self"] = ([value], 2)
    got = read(pickle.dumps(value, protocol))
    assert got["a"] is got["b"][0]
    assert got["self"][0][0] is got
    ordered = OrderedDict([("x", True), ("y", False)])
    ordered.note = "attributes are passed over"  # type: ignore[attr-defined]
    assert list(read(pickle.dumps(ordered, protocol)).items()) == list(ordered.items())


def test_states_of_random_generators_are_read() -> None:
    """A checkpoint of a training run may hold the state of Python's random, and long numbers."""
    state = {"python": random.getstate(), "pcg64": (1 << 127) + 3}
    assert read(pickle.dumps(state, 2)) == state


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_are_passed_over(protocol: int) -> None:
    """A set is no place for tensors; what is beside it is read."""
    assert read(pickle.dumps([{1, 2}, frozenset({"a"}), 3], protocol)) == [set(), frozenset(), 3]
    assert read(pickle.dumps([set(), 1], protocol)) == [set(), 1]


def test_strings_of_python_2_are_read() -> None:
    """What Python 2 wrote of strings, long numbers and OrderedDicts is read."""
    data = P + b"}(U\x01aT\x02\0\0\0bcU\x01bI12345678901\nU\x01cI01\nU\x01dL12L\nu."
    assert read(data) == {"a": "bc", "b": 12345678901, "c": True, "d": 12}
    pairs = b"ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R."
    assert list(read(P + pairs).items()) == [("a", 1), ("b", 2)]


def ordered(arguments: bytes) -> bytes:
    return P + b"ccollections\nOrderedDict\n" + arguments + b"R."


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too early"),
    "no-stop": (P + b"N", "too early"),
    "nothing-made": (P + b".", "stack"),
    "pops-too-much": (P + b"0.", "stack"),
    "pops-below-a-mark": (P + b"N(\x85.", "stack"),
    "tuple-of-too-few": (P + b"N\x86.", "stack"),
    "mark-missing": (P + b"Nt.", "stack"),
    "memo-missing": (P + b"h\x05.", "memo"),
    "memo-of-nothing": (P + b"q\x00.", "stack"),
    "marks-without-end": (P + b"(" * 10_001 + b".", "too deep"),
    "opcode-unknown": (P + b"\xfe.", "opcode fe"),
    "extension": (P + b"\x82\x01.", "opcode 82"),
    "instance": (P + b"(ios\nsystem\n.", "opcode 69"),
    "next-buffer": (b"\x80\x05\x97.", "opcode 97"),
    "protocol": (b"\x80\x06N.", "protocol is 6"),
    "frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "frame"),
    "string-too-long": (P + b"X\xff\xff\xff\xffab.", "4,294,967,295 bytes where 3"),
    "string-far-too-long": (b"\x80\x04\x8d" + b"\xff" * 8 + b"ab.", "where 3"),
    "bytes-too-long": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fab.", "where 3"),
    "bytearray-too-long": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "where 1"),
    "not-utf8": (P + b"X\x01\0\0\0\xff.", "UTF-8"),
    "half-a-pair": (P + b"X\x03\0\0\0\xed\xa0\x80.", "UTF-8"),
    "number-of-300-bytes": (P + b"\x8b\x2c\x01\0\0" + bytes(300) + b".", "300 bytes"),
    "number-of-negative-length": (P + b"\x8b\xff\xff\xff\xffN.", "bytes"),
    "digits-without-end": (P + b"I" + b"1" * 5000 + b"\n.", "line"),
    "digits-that-are-none": (P + b"Iabc\n.", "number"),
    "name-without-end": (P + b"c" + b"a" * 9000, "line"),
    "name-of-bytes": (b"\x80\x04C\x01aC\x01b\x93.", "no text"),
    "appends-to-a-table": (P + b"}Na.", "no list"),
    "appends-to-a-tuple": (P + b")(Ne.", "no list"),
    "fills-a-list": (P + b"]NNs.", "no table"),
    "fills-by-halves": (P + b"}(Nu.", "no table"),
    "adds-to-a-list": (b"\x80\x04](N\x90.", "no set"),
    "calls-a-string": (P + b"U\x01a)R.", "no function"),
    "calls-with-a-list": (P + b"ccollections\nOrderedDict\n]R.", "no function"),
    "calls-with-too-many": (ordered(b"NN\x86"), "2 arguments"),
    "key-list": (P + b"}]Ns.", "list"),
    "key-table": (P + b"}}Ns.", "dict"),
    "key-set": (b"\x80\x04}\x8fNs.", "set"),
    "key-tuple-in-a-tuple": (P + b"}N\x85\x85Ns.", "tuple"),
    "key-global": (P + b"}ctorch\nFloatStorage\nNs.", "StorageKind"),
    "key-long-tuple": (P + b"}(" + b"N" * 20 + b"tNs.", "20 parts"),
    "key-long-string": (P + b"}X\x01\x20\0\0" + b"a" * 8193 + b"Ns.", "8,193 characters"),
    "key-long-bytes-in-a-tuple": (P + b"}B\x01\x20\0\0" + b"a" * 8193 + b"\x85Ns.", "8,193"),
    "key-huge-number": (P + b"}\x8a\x09" + b"\x01" * 9 + b"Ns.", "huge number"),
    "key-twice": (P + b"}(U\x01aNU\x01aNu.", "'a' twice"),
    "key-twice-apart": (P + b"}U\x01aNsU\x01aNs.", "'a' twice"),
    "key-true-and-1": (P + b"}(\x88NK\x01Nu.", "twice"),
    "ordered-of-a-number": (ordered(b"K\x01\x85"), "no entries"),
    "ordered-of-numbers": (ordered(b"(K\x01K\x02t\x85"), "no entries"),
    "ordered-of-strings": (ordered(b"U\x02ab\x85\x85"), "no entries"),
    "ordered-twice": (ordered(b"K\x01N\x86K\x01N\x86\x86\x85"), "'1' twice"),
    "ordered-of-a-list-as-key": (ordered(b"]N\x86\x85\x85"), "list"),
    "size-of-a-number": (P + b"ctorch\nSize\nK\x01\x85R.", "size"),
    "builds-a-table": (P + b"}}b.", "changes a value"),
    "builds-a-name": (P + b"ctorch\nSize\n}b.", "changes a value"),
    "builds-a-list": (P + b"]Nb.", "changes a value"),
    "asks": (P + b"cos\nsystem\n.", "asks for os.system"),
    "asks-on-the-stack": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "asks for posix.system"),
    "asks-for-eval": (P + b"c__builtin__\neval\n.", "asks for __builtin__.eval"),
    "asks-at-length": (P + b"c" + b"a" * 4000 + b"\n" + b"b" * 4000 + b"\n.", "asks for aaa"),
    "persistent-list": (P + b"](U\x07storageNNNNeQ.", "beside its storages"),
    "persistent-short": (P + b"U\x07storage\x85Q.", "beside its storages"),
    "persistent-other": (P + b"(U\x06moduleNNNNtQ.", "beside its storages"),
    "persistent-kind-string": (P + b"(U\x07storageU\x03F32U\x010NK\x01tQ.", "unknown kind"),
    "persistent-key": (P + b"(U\x07storagectorch\nFloatStorage\n)NK\x01tQ.", "impossible size"),
    "from-type-of-itself": (
        P + b"ctorch._tensor\n_rebuild_from_type_v2\nq\0(h\0ctorch\nTensor\n(h\0NNNtNtR.",
        "impossible layout",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_plain_pickle_has_a_reason(case: str) -> None:
    """Each contradiction and each wish for more is refused in words, whatever comes before it."""
    data, words = WRONG[case]
    assert words in reason(data)


def test_a_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opcode makes one object at most; their number is bounded."""
    assert read(P + b"N" * 98 + b".") is None
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 100)
    assert read(P + b"N" * 98 + b".") is None
    assert "more than 100 opcodes" in reason(P + b"N" * 99 + b".")


def _long(opcode: bytes, size: int) -> bytes:
    return P + opcode * (size // len(opcode))


SIZE = 30_000
GREEDY: dict[str, bytes] = {
    "tables": _long(b"}", SIZE),
    "tables-kept": _long(b"}\x94", SIZE),
    "lists-in-lists": P + b"]" * (SIZE // 2) + b"a" * (SIZE // 2 - 1) + b".",
    "marks": _long(b"(", SIZE),
    "sets": _long(b"\x8f", SIZE),
    "tuples-in-tuples": P + b")" + b"\x85" * SIZE + b".",
    "nested-key": P + b"})" + b"\x85" * SIZE + b"Ns.",
    "memo": _long(b"N\x94", SIZE),
    "memo-index": P + b"Nr\xff\xff\xff\x7fr\xfe\xff\xff\xff.",
    "ordered-dicts": P + b"ccollections\nOrderedDict\nq\0)q\1" + b"h\0h\1R" * (SIZE // 5) + b".",
    "one-size-again": P + b"ctorch\nSize\nq\0(" + b"K\1" * 10_000 + b"t\x85q\1" + b"h\0h\1R" * 3000,
    "string-as-key": P + b"}X" + struct.pack("<I", SIZE) + b"a" * SIZE + b"Ns.",
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_greedy_pickle_costs_little(case: str) -> None:
    """Whatever a pickle does, it takes a hundred times its size at most."""
    tracemalloc.start()
    try:
        with contextlib.suppress(Malformed, Refused):
            read(GREEDY[case])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * max(SIZE, len(GREEDY[case]))


def test_a_list_of_entries_is_not_copied_for_ever() -> None:
    """A pickle of 9 kB that makes a table of one list of 1,000 entries 5,000 times is refused."""
    pairs = b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(1000))
    start = P + b"ccollections\nOrderedDict\nq\0](" + pairs + b"e\x85q\1"
    assert len(read(start + b"h\0h\1R" * 100 + b".")) == 1000
    assert "no entries" in reason(start + b"h\0h\1R" * 5000 + b".")


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_any_bytes_are_a_value_or_a_reason(data: st.DataObject) -> None:
    """Opcodes in any order never raise anything but the two errors."""
    codes = [bytes([code]) for code in b"]})(aeu\x85\x86\x87t0sRbQhqN.\x8f\x90\x93\x94K\x8c\x04"]
    names = [b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"U\x01a", b"K\x00", b"h\x00"]
    pieces = data.draw(st.lists(st.sampled_from(codes + names), max_size=40))
    with contextlib.suppress(Malformed, Refused):
        read(P + b"".join(pieces) + b".")
