"""Keys of rank_pattern and alpha_pattern: the meaning that `re` gives them, in bounded time."""

from __future__ import annotations

import re
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.adapters import Q, pair, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool.adapters.dialects.peft.automaton import Automaton, Effort, PatternError
from loratool.adapters.dialects.peft.patterns import PathPatterns
from loratool.errors import AdapterError

ATOMS = [
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\D", r"\w", r"\W", r"\s", "_", "-", "1", "^",
    "$", r"\b", r"\B", r"\A", r"\Z", "[a-c1]", r"[^\d.]", "A", "x\n",
    "(?<=a)", "(?<!ab)", r"(?<=[a.])",
]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "??", "{2,3}?"]

patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        inner.map(lambda one: f"(?:{one}|)"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=8,
)


def means(key: str, path: str) -> bool:
    """Whether PEFT's `get_pattern_key` finds a path by a key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(rf"(.*\.)?({key})$", path) is not None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(patterns, st.lists(st.text("ab.1_-A \n", min_size=1, max_size=8), min_size=8, max_size=8))
def test_patterns_mean_what_re_says(key: str, paths: list[str]) -> None:
    """A path is found by a key where `re.match` finds it, for all that a pattern is made of."""
    try:
        found = [means(key, path) for path in paths]
    except re.error:
        with pytest.raises(PatternError):
            Automaton(rf"(.*\.)?({key})$", Effort())
        return
    automaton = Automaton(rf"(.*\.)?({key})$", Effort())
    assert [automaton.matches(path) for path in paths] == found


PLAIN = st.lists(st.sampled_from(["q", "proj", "_", "-", ".", r"\.", "1", r"\-"]), min_size=1)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "^"]), PLAIN.map("".join), st.sampled_from(["", "$"])).map(
            "".join
        ),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    st.lists(st.text("qproj_-.1^$\n", min_size=1, max_size=7), min_size=6, max_size=6),
)
def test_paths_as_keys_mean_what_re_says(keys: list[str], paths: list[str]) -> None:
    """Keys that are paths are looked up, and mean the same: a dot stands for any character, and the
    first key of the table that fits is taken."""
    table = {key: float(number) for number, key in enumerate(keys)}
    found = PathPatterns(table, "rank_pattern", Effort())
    for path in [*paths, *(key.strip("^$").replace("\\", "") for key in keys)]:
        first = next((table[key] for key in keys if means(key, path)), -1.0)
        assert found.first(path, -1.0) == first, (keys, path)


def test_the_first_key_wins_among_paths_and_expressions() -> None:
    """The order of the table decides, whichever kind a key is of."""
    for keys in (("q_proj", ".*q_proj"), (".*q_proj", "q_proj")):
        table = dict(zip(keys, (1.0, 2.0), strict=True))
        assert PathPatterns(table, "rank_pattern", Effort()).first("a.q_proj", 0.0) == 1.0


LONG = f"model.{'a' * 3000}.q_proj"
RUNAWAYS = [
    r"((a|aa)+)+$", "(a*)*b", "(.*)*x", "(a|a)*b", "(a?){2000}a{2000}", "(?:a{0,50}){0,50}b",
    "((a{1000}){1000}){1000}", "(){1000000000}", "(" * 500 + "a" + ")" * 500,
    "a{99999999999999999999}", r"(.*)\1\1x", "(?=(a+)+x)a", "(.*a){400}", "[", "(?i:q)",
    "(?!" * 200 + "a" + ")" * 200,
]  # fmt: skip


@pytest.mark.parametrize("key", RUNAWAYS, ids=range(len(RUNAWAYS)))
def test_no_pattern_runs_away(key: str) -> None:
    """Each answers, or is refused by its name, within a second or so of a small budget; `re` would
    take years for some."""
    started = time.process_time()
    with suppress(AdapterError):
        assert PathPatterns({key: 4}, "rank_pattern", Effort(2_000_000)).first(LONG, 8) == 8
    assert time.process_time() - started < 10


def test_many_keys_and_many_paths_are_looked_up() -> None:
    """A table with a path for each of thousands of modules is not gone through for each."""
    paths = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(64)]
    effort = Effort()
    found = PathPatterns(dict.fromkeys(paths, 3), "rank_pattern", effort)
    assert {found.first(path, 8) for path in paths} == {3}
    assert Effort().left - effort.left < 1_000_000


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_hostile_pattern_stops_no_verb(field: str, tmp_path: Path) -> None:
    """inspect answers for an adapter with a pattern that keeps `re` busy for ever."""
    adapter = write_adapter(tmp_path / "a", pair(Q, 6, 5), {field: {"((.*)*)*x": 4}})
    assert loratool.inspect(adapter).modules[0].rank == 4
    adapter = write_adapter(tmp_path / "b", pair(Q, 6, 5), {field: {r"(a)\1": 4}})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field} has the key"):
        loratool.inspect(adapter)


def test_thousands_of_anchored_paths_are_looked_up() -> None:
    """Keys as `^a\\.b$`, which mean one module of many experts, cost no more than paths."""
    keys = [rf"^layers\.{i}\.expert\.{j}\.up_proj$" for i in range(60) for j in range(384)]
    found = PathPatterns(dict.fromkeys(keys, 3), "rank_pattern", Effort(5_000_000))
    assert found.first("layers.7.expert.9.up_proj", 8) == 3
    assert found.first("model.layers.7.expert.9.up_proj", 8) == 8
