"""YAML that means more than it says: bombs of aliases, endless nesting, numbers without end."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from helpers.pushing import lora

import loratool
from loratool.errors import FileError
from loratool.publishing.cards.metadata import read_metadata, read_yaml

_KEYS = ",".join(f"k{i}: 1" for i in range(100))
_STEP = "\n{1}: &{1} {{<<: [" + ",".join(["*{0}"] * 100) + "]}}"

HOSTILE = {
    "aliases": "a: &a [1,2]\n"
    + "\n".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise("abcdefg")
    ),
    "merged-keys": f"a: &a {{{_KEYS}}}" + _STEP.format("a", "b") + _STEP.format("b", "c"),
    "in-itself": "a: &a [*a]",
    "in-its-second-self": "a: &a 1\nb: &a [*a]",
    "deep": "a: " + "[" * 300_000,
    "deep-mappings": "? " * 300_000,
    "hexadecimal": "a: 0x" + "f" * 900_000,
    "sexagesimal": "a: 1" + ":1" * 400_000,
    "tagged": 'a: !!int "1' + ":1" * 400_000 + '"',
    "decimal": "a: " + "1" * 900_000,
    "date": "a: 2020-99-99",
    "zone": "a: 2020-01-01T00:00:00+99:99",
    "no-number": 'a: !!int ""',
    "no-truth": "a: !!bool perhaps",
    "twice": "a: 1\nb: 2\na: 3",
    "object": "a: !!python/object/apply:os.system ['true']",
    "long": "a: " + "x" * 1_000_001,
    "many": f"a: [{'1,' * 200_000}]",
    "pairs": "[[a, b]]",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_at_once(kind: str) -> None:
    """One short error within a second or two, whatever it would take to read it."""
    started = time.perf_counter()
    with pytest.raises(FileError) as caught:
        read_yaml(HOSTILE[kind])
    assert time.perf_counter() - started < 5
    assert len(caught.value.message) < 500


def test_a_card_that_is_refused_stays(tmp_path: Path) -> None:
    """`card` leaves the file as it was; a new section would not have harmed it, but a guess may."""
    adapter = lora(tmp_path / "adapter")
    text = f"---\n{HOSTILE['aliases']}\n---\nWords.\n"
    (adapter / "README.md").write_text(text)
    with pytest.raises(FileError, match=r"README\.md"):
        loratool.card(adapter)
    assert (adapter / "README.md").read_text() == text


def test_cards_with_long_results_and_aliases_are_read() -> None:
    """What authors write: results of many tests, and a value named twice."""
    results = "".join(f"- {{name: n{i}, metrics: [{{value: {i}.5}}]}}\n" for i in range(3_000))
    assert len(read_yaml(f"model-index:\n{results}")["model-index"]) == 3_000
    assert read_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a}") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1},
    }
    merged = read_yaml("a: &a {b: 1}\ne: &e {f: 2}\nd: {<<: *a, <<: *e}")["d"]
    assert merged == {"b": 1, "f": 2}


def test_a_block_without_an_end_is_no_metadata() -> None:
    """Line breaks without end are gone through once."""
    assert read_metadata("---\n" + "\n" * 1_000_000) == {}
    assert read_metadata("\ufeff---\r\nlicense: mit\r\n---\r\n") == {"license": "mit"}
