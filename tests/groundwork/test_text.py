"""Text from outside, fit to be shown: every character seen, no line begun, no endless name."""

from __future__ import annotations

import json
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import LoraToolError, listed
from loratool.notices import Notice
from loratool.paths import ranged_names, selected, split
from loratool.text import (
    escaped,
    is_printable,
    json_text,
    printable,
    printable_message,
)
from loratool.words import enumerated

ANY = st.text(st.characters(exclude_categories=[]), max_size=40)
QUICK = settings(max_examples=200, derandomize=True, deadline=None)


def harmful(text: str) -> list[str]:
    """Characters that move a cursor, turn a line, cannot be seen or cannot be encoded."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co")]


@QUICK
@given(ANY)
def test_nothing_unseen_is_left(text: str) -> None:
    """What comes out is one line of visible characters, and comes out of itself unchanged."""
    shown = printable(text)
    assert harmful(shown) == []
    assert printable(shown) == shown
    if is_printable(text):
        assert shown == text


@QUICK
@given(ANY.filter(lambda text: "\\" not in text))
def test_escapes_tell_the_text(text: str) -> None:
    """Without backslashes in it, the text can be got back from what is shown."""
    shown = escaped(text)
    back = shown.encode("ascii", "backslashreplace").decode("unicode_escape", "surrogatepass")
    assert back == text


@pytest.mark.parametrize(
    "number",
    [
        *range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F,
        *range(0x2028, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0xD800, 0xDC80, 0x3164,
        *range(0xE0000, 0xE0080), 0xE0100,
    ],
)  # fmt: skip
def test_each_kind_of_harmful_character_is_escaped(number: int) -> None:
    """C0, DEL, C1, bidi, separators, what has no width, tags, lone surrogates, fillers."""
    assert printable(f"a{chr(number)}b").isascii()
    assert chr(number) not in printable_message(f"a{chr(number)}b")


def test_words_of_all_scripts_stay() -> None:
    """Letters with marks, ideographs, arrows, emoji and mathematics are shown as they are."""
    for text in (
        "naïve café",
        "模型/权重",
        "‖ΔW‖ σ₁ → ½",
        "Ünïcödé 🤗",
        "layers.{0-3}.q",
        r"a\\.b",
    ):
        assert printable(text) == text


@QUICK
@given(ANY, ANY)
def test_a_name_begins_no_line_of_ours(name: str, other: str) -> None:
    """Lines of an error or a notice that are not the first are those of its list."""
    error = LoraToolError(f"{name}: bad:\n{listed([name, other])}", f"Look at {other}.")
    for text in (str(error), error.hint, Notice("code", f"{name} x").message):
        first, *more = text.split("\n")
        assert harmful(first) == []
        assert all(line.startswith("  ") and not harmful(line) for line in more)
    assert len(listed([name, other]).split("\n")) == 2
    assert harmful(enumerated([name, other])) == []


def test_long_texts_are_cut() -> None:
    """A word over 400 characters, a line over 2,000 and a text over 6,000 lose their middle."""
    assert printable("a" * 400) == "a" * 400
    assert printable("a" * 401) == "a" * 250 + "…" + "a" * 100
    message = printable_message(f"x: tensor '{'n' * 10**6}' is bad; expected F32")
    assert message.startswith("x: tensor 'nnn")
    assert message.endswith("nnn' is bad; expected F32")
    assert len(message) < 420
    line = printable("word " * 1000)
    assert "characters left out) …" in line
    assert len(line) <= 2000
    text = printable_message("x:\n" + listed([f"{i} " + "word " * 300 for i in range(9)], shown=9))
    assert 5900 < len(text) <= 6000
    said = printable("ab " * 1000)
    left_out = int(said.partition("… (")[2].partition(" ")[0].replace(",", ""))
    assert left_out + sum(len(part) for part in said.split("…")[::2]) == 3000


@pytest.mark.parametrize("unit", ["a", "\x1b", "ab ", "a" * 399 + " ", "\n  - a"])
def test_huge_texts_take_no_time(unit: str) -> None:
    """Only the ends of 50 MB are looked at."""
    text = unit * (50_000_000 // len(unit))
    before = time.process_time()
    for show in (printable, printable_message):
        assert len(show(text)) <= 6000
    assert time.process_time() - before < 3


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY, lambda x: st.lists(x) | st.dictionaries(ANY, x)
)


@settings(QUICK, max_examples=60)
@given(NESTED, st.sampled_from([None, 2]), st.sampled_from(["utf-8", "ascii", "latin-1"]))
def test_json_gives_the_same_document_and_does_nothing(
    document: object, indent: int | None, encoding: str
) -> None:
    """JSON for a terminal is valid, exact, and of visible characters that the terminal has."""
    text = json_text(document, indent=indent, encoding=encoding)
    assert harmful(text.replace("\n", "")) == []
    text.encode(encoding)
    assert json.loads(text) == json.loads(json.dumps(document))


def test_json_has_no_nan() -> None:
    """A NaN would break the reader's parser."""
    with pytest.raises(ValueError, match="JSON"):
        json_text({"x": float("nan")})


@pytest.mark.parametrize(
    "names",
    [["a.#.q", "a.0.q"], ["layers.².q", "layers.1.q"], [f"layers.{'1' * 5000}.q", "layers.2.q"],
     ["a.٣.b", "a.3.b"], ["." * 50, "1.2.3"], ["a.{0-3}.q", "a.{.b"]],
)  # fmt: skip
def test_paths_of_odd_numbers_are_folded_without_a_failure(names: list[str]) -> None:
    """What is no number of a layer is a name, and paths of different patterns stay apart."""
    assert len(ranged_names(names)) == 2
    for name in names:
        assert ".".join(filter(None, split(name))) == name
        selected([*names, "x.1"], "1", [])


def test_a_very_long_path_is_split_at_once() -> None:
    """Braces and dots by the hundred thousand take no time."""
    before = time.process_time()
    split(".{" * 200_000)
    assert time.process_time() - before < 2
