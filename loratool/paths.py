"""Module paths: folded to names with ranges, chosen by layer, glob and kind, and their ends."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loratool.errors import UsageError, nearest

#: What has a path.
Item = TypeVar("Item")

#: A part of a path that counts layers or experts; longer ones are names of another kind.
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")


def pattern(path: str) -> str:
    """The path with "#" for each of its numbers: "layers.#.q"."""
    return _NUMBER.sub("#", path.replace("#", "##"))


def numbers_of(path: str) -> list[int]:
    """The numbers of a path, in their order."""
    return [int(number) for number in _NUMBER.findall(path)]


def dotted_ends(path: str) -> Iterator[str]:
    """A path, and what of it follows each of its dots: "a.b.c", "b.c", "c"."""
    yield path
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


def ranged(paths: Sequence[str]) -> str:
    """Paths of one pattern -> one name: "layers.0.q" to "layers.3.q" -> "layers.{0-3}.q"."""
    columns = list(zip(*map(numbers_of, paths), strict=True))
    parts = _NUMBER.split(paths[0])
    named = [_ranges(sorted(set(numbers))) for numbers in columns]
    return parts[0] + "".join(r + part for r, part in zip(named, parts[1:], strict=True))


def ranged_names(paths: Iterable[str]) -> list[str]:
    """Paths that are alike but for their numbers as one name each, in the order of the first."""
    return [ranged(group) for group in grouped(paths, str, lambda _: None)]


def grouped(
    items: Iterable[Item], path: Callable[[Item], str], alike: Callable[[Item], Any]
) -> list[list[Item]]:
    """Items whose paths differ in their numbers only, and that are `alike`, taken together; in the
    order of the first."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault((pattern(path(item)), alike(item)), []).append(item)
    return list(groups.values())


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
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if _COUNTED.fullmatch(parts[count - 1]):
            return ".".join(parts[:count]), ".".join(parts[count:])
    return "", name


#: A number, or the range that `ranged` makes of several.
_COUNTED = re.compile(r"[0-9]+|\{[^}]*\}")


def selected(paths: Sequence[str], layers: str | None, include: Sequence[str]) -> list[str]:
    """The module paths of these layers ("3" or "0-5,7") whose end matches one of the globs.

    Raises UsageError for what is no range, and if there are paths but none is left.
    """
    wanted = _layer_set(layers)
    chosen = [path for path in paths if _is_chosen(path, wanted, include)]
    if paths and not chosen:
        asked = [f"layers {layers}"] * bool(layers) + [repr(glob) for glob in include]
        idle = [glob for glob in include if not any(matches(path, [glob]) for path in paths)]
        raise UsageError(
            f"No module matches ({', '.join(asked)}).",
            path_hint(idle[0], paths) if idle else _look(paths),
        )
    return chosen


def path_hint(glob: str, paths: Iterable[str]) -> str:
    """What somebody may have meant by a glob that matches none of the paths, and how these look."""
    known = list(paths)
    exact = set("*?[0123456789")  # another number is no misspelt one
    parts = {part for path in known for part in path.split(".")}
    meant = ".".join(
        part if part in parts or set(part) & exact else nearest(part, sorted(parts)) or part
        for part in glob.split(".")
    )
    fits = any(matches(path, [meant]) for path in known)
    ends = {path.rpartition(".")[2] for path in known}
    near = meant if fits else nearest(glob, sorted(ends))
    return (f"Did you mean {near}? " if near else "") + _look(known)


def _look(paths: Sequence[str]) -> str:
    return f"The paths look like {next((p for p in paths if '.' in p), next(iter(paths), '…'))}."


def _layer_set(layers: str | None) -> set[int] | None:
    if layers is None:
        return None
    found: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UsageError(f"Not a range of layers: {layers!r}.", "Write 3, 0-5 or 0-5,7.")
        low, high = int(match[1]), int(match[2] or match[1])
        found.update(range(low, high + 1))
    return found


def _is_chosen(path: str, layers: set[int] | None, include: Sequence[str]) -> bool:
    if layers is not None:
        numbers = numbers_of(path)
        if not numbers or numbers[0] not in layers:
            return False
    return not include or matches(path, include)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a path, or a dotted end of it, matches one of the globs."""
    return any(
        fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"*.{glob}") for glob in globs
    )


@dataclass(frozen=True)
class Choice:
    """Which parts of an adapter a user wants, by globs: those that `include` names, or all without
    it, less those that `exclude` names."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def takes(self, *names: str) -> bool:
        """Whether a part is wanted that goes by these names."""
        wanted = not self.include or any(matches(name, self.include) for name in names)
        return wanted and not any(matches(name, self.exclude) for name in names)

    def to_dict(self) -> dict[str, list[str]]:
        """The globs by option, of those that are given."""
        given = {"include": list(self.include), "exclude": list(self.exclude)}
        return {option: globs for option, globs in given.items() if globs}


#: All of an adapter.
EVERYTHING = Choice()

#: Kinds of tensors that can be left out as a whole: what `extract --skip` may be.
GROUPS = ("norms", "biases", "embeddings", "convs", "heads", "others")
