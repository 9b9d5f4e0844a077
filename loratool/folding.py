"""Paths for people: those that differ only in their numbers become one name with ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence


def pattern(path: str) -> str:
    """The path with "#" for each of its numbers: "layers.#.q"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)


def ranged(paths: Sequence[str]) -> str:
    """Paths of one pattern -> one name: "layers.0.q" to "layers.3.q" -> "layers.{0-3}.q"."""
    columns = list(zip(*([int(n) for n in _numbers(p)] for p in paths), strict=True))
    parts = pattern(paths[0]).split("#")
    named = [_ranges(sorted(set(numbers))) for numbers in columns]
    return parts[0] + "".join(r + part for r, part in zip(named, parts[1:], strict=True))


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = [f"{a}-{b}" if a != b else str(a) for a, b in runs]
    return "{" + ",".join(shown[:4]) + (",…" if len(shown) > 4 else "") + "}"


def split(name: str) -> tuple[str, str]:
    """Path up to and with its last number, and the rest."""
    found = re.match(r"(.*(?:^|\.)(?:\d+|\{[^}]*\}))\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)
