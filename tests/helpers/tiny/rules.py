"""Short rules that say what many facts say: runs of names, with as little around as will do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from helpers.tiny.facts import Fact, Name
from loratool.models.layouts.rules import NameRule, apply_rules

#: A replacement of a run of a name: where it begins and ends, and what comes in its place, with
#: what is said beside it. A tensor that becomes several has several of these.
Outcomes = tuple[tuple[Name, str], ...]


@dataclass
class Hunk:
    """Where a name on disk differs from that in memory, and how much around it the rule needs."""

    start: int
    stop: int
    outcomes: Outcomes
    left: int = 0
    right: int = 0
    #: How much it has to be at least.
    wanted: int = 0


@dataclass
class Evidence:
    """A name on disk between its ends, and where it differs."""

    fact: Fact
    name: Name
    hunks: list[Hunk] = field(default_factory=list)


class Unclear(Exception):
    """No rule tells a name apart from another one."""


def rules_for(facts: Iterable[Fact], memory: Iterable[Name]) -> list[list[Any]]:
    """Rules that make of each name on disk what the facts say, and leave names of memory alone."""
    evidence = [_evidence(fact) for fact in facts]
    plain = {("^", *name, "$") for name in memory}
    for _ in range(200):
        _choose_contexts(evidence, plain)
        rules = _ordered(evidence)
        wrong = [one for one in evidence if not _holds(rules, one.fact)]
        if not wrong:
            break
        for one in wrong:
            _widen(one)
    else:
        raise Unclear(".".join(wrong[0].fact.disk))
    for name in plain:
        (result,) = apply_rules(list(map(NameRule.read, rules)), name[1:-1])
        if result != (name[1:-1], {}):
            raise Unclear(f"{'.'.join(name[1:-1])} becomes {'.'.join(result[0])}")
    return rules


# --- where names differ ---------------------------------------------------------------------------


def _evidence(fact: Fact) -> Evidence:
    one = Evidence(fact, ("^", *fact.disk, "$"))
    spans: list[list[tuple[int, int, Name]]] = []
    for memory, _ in fact.meanings:
        matcher = SequenceMatcher(None, fact.disk, memory, autojunk=False)
        spans.append(
            [
                (i + 1, j + 1, memory[k:m])
                for tag, i, j, k, m in matcher.get_opcodes()
                if tag != "equal"
            ]
        )
    said = [text for _, text in fact.meanings]
    if len(spans) == 1:
        found = [Hunk(i, j, ((new, "{}"),)) for i, j, new in spans[0]]
        if said[0] != "{}":
            if not found:
                # The same name, in another arrangement.
                end = len(one.name) - 1
                found = [Hunk(end - 1, end, ((one.name[end - 1 : end], "{}"),))]
            found[-1].outcomes = ((found[-1].outcomes[0][0], said[0]),)
        one.hunks = found
        _join_near(one)
        return one
    common = [span for span in spans[0] if all(span in other for other in spans[1:])]
    own = [[span for span in each if span not in common] for each in spans]
    ends = [end for each in own for span in each for end in span[:2]]
    start, stop = (min(ends), max(ends)) if ends else (len(one.name) - 2, len(one.name) - 1)
    inside = [span for span in common if start <= span[0] <= stop]
    if inside:
        common = [span for span in common if span not in inside]
    before = sum(len(new) - (j - i) for i, j, new in common if i < start)
    after = sum(len(new) - (j - i) for i, j, new in common if i >= stop)
    outcomes = []
    for memory, text in fact.meanings:
        end = len(memory) - (len(fact.disk) - (stop - 1)) - after
        outcomes.append((memory[start - 1 + before : end], text))
    one.hunks = sorted(
        [Hunk(i, j, ((new, "{}"),)) for i, j, new in common] + [Hunk(start, stop, tuple(outcomes))],
        key=lambda hunk: hunk.start,
    )
    return one


def _join_near(one: Evidence) -> None:
    """Make one of hunks with a single part between them, where one only adds or takes away: they
    are one change, as of `language_model.model` to `model.language_model`."""
    at = 0
    while at + 1 < len(one.hunks):
        first, second = one.hunks[at : at + 2]
        one_way = any(h.start == h.stop or not h.outcomes[0][0] for h in (first, second))
        if second.start - first.stop <= 1 and one_way:
            _merge(one, at)
        else:
            at += 1


# --- what is around them --------------------------------------------------------------------------


def _pattern(name: Name, hunk: Hunk) -> tuple[Name, tuple[tuple[Name, str], ...]]:
    """The rule of a hunk: its pattern, and what becomes of it."""
    left, inner, right = (
        name[hunk.start - hunk.left : hunk.start],
        name[hunk.start : hunk.stop],
        name[hunk.stop : hunk.stop + hunk.right],
    )
    numbers = [part for part in inner if part.isdecimal()]
    kept = all([part for part in new if part.isdecimal()] == numbers for new, _ in hunk.outcomes)
    disk = (*_wild(left), *(_wild(inner) if kept else inner), *_wild(right))
    outcomes = tuple(
        (
            tuple(
                part
                for part in (*_wild(left), *(_wild(new) if kept else new), *_wild(right))
                if part not in ("^", "$")
            ),
            text,
        )
        for new, text in hunk.outcomes
    )
    return disk, outcomes


def _wild(name: Sequence[str]) -> Name:
    return tuple("#" if part.isdecimal() else part for part in name)


def _says_enough(name: Name, hunk: Hunk) -> bool:
    """Whether a pattern is long enough to mean the same in names that were not looked at."""
    disk, _ = _pattern(name, hunk)
    words = [part for part in disk if part not in ("^", "$", "#", "{e}") and not part.isdecimal()]
    takes_away = any(not new for new, _ in hunk.outcomes)
    return (
        bool(words)
        # One word alone may be part of another spelling, or of a sibling that was not looked at.
        and len(disk) > 1
        # What begins the name, an expert's number and what only goes needs what is before it.
        and (hunk.left > 0 or (hunk.start > 1 and not takes_away))
        and disk[0] not in ("{e}",)
        and not disk[0].isdecimal()
    )


def _choose_contexts(evidence: list[Evidence], plain: set[Name]) -> None:
    """Give each hunk the least context with which its pattern is right wherever it is found."""
    index: dict[Name, list[Hunk]] = {name: [] for name in plain}
    index |= {one.name: one.hunks for one in evidence}
    settled: dict[Any, bool] = {}
    while not all(_choose_context(one, index, settled) for one in evidence):
        settled.clear()
        for one in evidence:
            for hunk in one.hunks:
                hunk.left = hunk.right = 0


def _choose_context(one: Evidence, index: dict[Name, list[Hunk]], settled: dict[Any, bool]) -> bool:
    """False where there is none, and two hunks of the name were made one."""
    for at, hunk in enumerate(one.hunks):
        before = one.hunks[at - 1].stop if at else 0
        after = one.hunks[at + 1].start if at + 1 < len(one.hunks) else len(one.name)
        choice = _least(one, hunk, (hunk.start - before, after - hunk.stop), index, settled)
        if choice is None:
            if len(one.hunks) == 1:
                raise Unclear(".".join(one.fact.disk))
            _merge(one, at if at + 1 < len(one.hunks) else at - 1)
            return False
        hunk.left, hunk.right = choice
    return True


def _least(
    one: Evidence, hunk: Hunk, room: tuple[int, int], index: dict[Name, list[Hunk]],
    settled: dict[Any, bool],
) -> tuple[int, int] | None:  # fmt: skip
    for size in range(hunk.wanted, sum(room) + 1):
        for left in range(min(room[0], size), max(0, size - room[1]) - 1, -1):
            trial = Hunk(hunk.start, hunk.stop, hunk.outcomes, left, size - left)
            if not _says_enough(one.name, trial):
                continue
            rule = _pattern(one.name, trial)
            key = (rule, left, trial.stop - trial.start)
            if key not in settled:
                settled[key] = all(
                    _right_in(rule, trial, name, hunks) for name, hunks in index.items()
                )
            if settled[key]:
                return left, size - left
    return None


def _right_in(rule: tuple[Name, Outcomes], trial: Hunk, name: Name, hunks: list[Hunk]) -> bool:
    """Whether the pattern is found in this name only where the name has that very difference."""
    disk, outcomes = rule
    for at in range(len(name) - len(disk) + 1):
        run = name[at : at + len(disk)]
        if all(map(_fits, disk, run)):
            start = at + trial.left
            stop = start + trial.stop - trial.start
            same = [
                hunk
                for hunk in hunks
                if (hunk.start, hunk.stop) == (start, stop)
                and _pattern(name, Hunk(start, stop, hunk.outcomes, trial.left, trial.right))
                == (disk, outcomes)
            ]
            if not same:
                return False
    return True


def _fits(want: str, part: str) -> bool:
    if want == "#":
        return part.isdecimal() or part == "{e}"
    return want == part or (want == "{e}" and part.isdecimal())


def _merge(one: Evidence, at: int) -> None:
    """Make one hunk of two, with what stands between them."""
    first, second = one.hunks[at : at + 2]
    between = one.name[first.stop : second.start]
    outcomes = tuple(
        (
            (*new_first, *between, *new_second),
            json.dumps({**json.loads(text_first), **json.loads(text_second)}, sort_keys=True),
        )
        for new_first, text_first in first.outcomes
        for new_second, text_second in second.outcomes
    )
    one.hunks[at : at + 2] = [Hunk(first.start, second.stop, outcomes)]


def _widen(one: Evidence) -> None:
    """Let the rules of a name see more of it."""
    if len(one.hunks) > 1:
        _merge(one, len(one.hunks) - 2)
    elif not one.hunks or one.hunks[0].wanted > len(one.name):
        raise Unclear(".".join(one.fact.disk))
    else:
        one.hunks[0].wanted = one.hunks[0].left + one.hunks[0].right + 1


# --- all together ---------------------------------------------------------------------------------


def _ordered(evidence: list[Evidence]) -> list[list[Any]]:
    """The rules of all hunks as they stand in the table, the longest first."""
    rules = {
        (disk, memory, text)
        for one in evidence
        for hunk in one.hunks
        for disk, outcomes in [_pattern(one.name, hunk)]
        for memory, text in outcomes
    }
    ordered = sorted(rules, key=lambda rule: (-len(rule[0]), rule))
    return [
        [".".join(disk), ".".join(memory), *([json.loads(text)] if text != "{}" else [])]
        for disk, memory, text in ordered
    ]


def _holds(rules: list[list[Any]], fact: Fact) -> bool:
    name = tuple("0" if part == "{e}" else part for part in fact.disk)
    found = [
        (memory, {key: value for key, value in attributes.items() if key != "expert"})
        for memory, attributes in apply_rules(list(map(NameRule.read, rules)), name)
    ]
    wanted = [(memory, json.loads(text)) for memory, text in fact.meanings]
    return sorted(map(repr, found)) == sorted(map(repr, wanted))
