"""Which modules a command was asked for: by layer number and by glob."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from loratool.errors import UsageError

#: Kinds of tensors that can be left out as a whole: what `extract --skip` may be.
GROUPS = ("norms", "biases", "embeddings", "convs", "heads", "others")

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def selected(paths: Sequence[str], layers: str | None, include: Sequence[str]) -> list[str]:
    """The module paths of these layers ("3" or "0-5,7") whose end matches one of the globs.

    Raises UsageError for what is no range, and if there are paths but none is left.
    """
    wanted = _layer_set(layers)
    chosen = [path for path in paths if _is_chosen(path, wanted, include)]
    if paths and not chosen:
        asked = [f"layers {layers}"] * bool(layers) + [repr(glob) for glob in include]
        raise UsageError(
            f"No module matches ({', '.join(asked)}).",
            f"The paths look like {paths[0]}.",
        )
    return chosen


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
        number = _LAYER.search(path)
        if number is None or int(number[1]) not in layers:
            return False
    return not include or matches(path, include)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a path, or a dotted end of it, matches one of the globs."""
    return any(
        fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"*.{glob}") for glob in globs
    )
