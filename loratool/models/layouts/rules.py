"""One step from a name in a file to a name in memory: a run of its parts is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class NameRule(NamedTuple):
    """One replacement, and what the tensor is then."""

    disk: tuple[str, ...]
    memory: tuple[str, ...]
    attributes: Mapping[str, Any]

    @classmethod
    def read(cls, value: Sequence[Any]) -> NameRule:
        """A rule from its form in the table."""
        return cls(_split(value[0]), _split(value[1]), dict(*value[2:]))

    def below(self, key: str) -> NameRule:
        """The same for a part of a model, whose config is found under a key of the whole one's."""
        kind, _, where = self.attributes.get("order", "").partition(":")
        if not where:
            return self
        return self._replace(attributes={**self.attributes, "order": f"{kind}:{key}.{where}"})


def _split(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.split(".")) if pattern else ()


def apply_rules(
    rules: Sequence[NameRule], parts: tuple[str, ...], attributes: Mapping[str, Any] | None = None
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """All that the rules make of a name: one name, or several where a tensor is split."""
    found = [(parts, dict(attributes or {}))]
    at = 0
    while at < len(rules):
        end = at + 1
        while end < len(rules) and rules[end].disk == rules[at].disk:
            end += 1
        found = [
            result
            for one, known in found
            for result in _replaced(rules[at:end], one, known) or [(one, known)]
        ]
        at = end
    return found


def _replaced(
    rules: Sequence[NameRule], parts: tuple[str, ...], attributes: dict[str, Any]
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """What these rules with one pattern make of a name; nothing if the pattern is not in it."""
    pattern = rules[0].disk
    ends = ("^", *parts, "$")
    for at in range(len(ends) - len(pattern) + 1):
        run = ends[at : at + len(pattern)]
        if all(map(_fits, pattern, run)):
            break
    else:
        return []
    numbers = [part for want, part in zip(pattern, run, strict=True) if want == "#"]
    expert = [part for want, part in zip(pattern, run, strict=True) if want == "{e}"]
    results = []
    for rule in rules:
        order = iter(numbers)
        memory = tuple(next(order) if part == "#" else part for part in rule.memory)
        whole = (*ends[:at], *memory, *ends[at + len(pattern) :])
        own = {**attributes, **rule.attributes, **({"expert": expert[0]} if expert else {})}
        results.append((tuple(part for part in whole if part not in ("^", "$")), own))
    return results


def _fits(want: str, part: str) -> bool:
    if want in ("#", "{e}"):
        return part.startswith("#") or part.isdecimal()
    return want == part
