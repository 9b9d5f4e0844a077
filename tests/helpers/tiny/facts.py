"""What is true of a step of a conversion whatever the sizes: names, shares of rows, experts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig

from helpers.tiny.reading_off import Piece, Rows
from helpers.tiny.reversal import Step

Name = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One tensor on disk, and all that it is in memory: names with what a rule says beside them.

    The number of an expert is `{e}`; names are those below the part's path.
    """

    disk: Name
    meanings: tuple[tuple[Name, str], ...]


def facts_of(step: Step, other: Step | None) -> Iterator[Fact]:
    """The facts of one step, by a model of other sizes too."""
    experts: dict[tuple[Name, Name], list[tuple[int, int, int]]] = defaultdict(list)
    found: list[tuple[Name, list[tuple[Name, dict[str, Any], Name | None]]]] = []
    starts = _starts(step)
    for full, pieces in step.pieces.items():
        if not any(is_below(piece.memory, step.part.path) for piece in pieces):
            continue
        others = other.pieces.get(full) if other else None
        disk = below(full, step.part.path)
        meanings: list[tuple[Name, dict[str, Any], Name | None]] = []
        marked = disk
        for at, piece in enumerate(pieces):
            second = others[at] if others and len(others) == len(pieces) else None
            memory = below(piece.memory, step.part.path)
            attributes = _attributes(piece, second, pieces, starts, step.part.config)
            key = None
            if piece.expert is not None:
                place = _expert_place(disk, memory)
                marked = (*disk[:place], "{e}", *disk[place + 1 :])
                key = memory
                experts[_wild(marked), key].append(
                    (int(disk[place]), piece.expert, step.before[piece.memory][0])
                )
            meanings.append((memory, attributes, key))
        found.append((marked, meanings))
    totals: dict[Name, int] = defaultdict(int)
    for (disk, _), numbers in experts.items():
        totals[disk] = max(totals[disk], *(number + 1 for number, _, _ in numbers))
    grouped: dict[Name, dict[tuple[Name, str], None]] = defaultdict(dict)
    for disk, meanings in found:
        for memory, attributes, key in meanings:
            if key is not None:
                numbers = experts[_wild(disk), key]
                (offset,) = {number - expert for number, expert, _ in numbers}
                count, total = numbers[0][2], totals[_wild(disk)]
                if count != total:
                    share = Fraction(offset, total), Fraction(offset + count, total)
                    attributes["experts"] = [str(end) for end in share]
            grouped[disk][memory, json.dumps(attributes, sort_keys=True)] = None
    for disk, known in grouped.items():
        yield Fact(disk, tuple(known))


def is_below(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def below(name: str, path: str) -> Name:
    """What of a name follows a path; ValueError if it is elsewhere."""
    if not is_below(name, path):
        raise ValueError(f"{name} left {path}")
    return tuple(name[len(path) + 1 if path else 0 :].split("."))


def _wild(name: Name) -> Name:
    return tuple("#" if part.isdecimal() else part for part in name)


def _expert_place(disk: Name, memory: Name) -> int:
    """Which part of a name is an expert's number: the last without which the numbers are those in
    memory."""
    wanted = [part for part in memory if part.isdecimal()]
    places = [at for at, part in enumerate(disk) if part.isdecimal()]
    for place in reversed(places):
        if [disk[at] for at in places if at != place] == wanted:
            return place
    raise ValueError(f"{'.'.join(disk)}: no number of an expert")


def _attributes(
    piece: Piece,
    other: Piece | None,
    siblings: Sequence[Piece],
    starts: Mapping[str, list[int]],
    config: PretrainedConfig,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if piece.rows is not None:
        of = starts[piece.memory]
        found["rows"] = _share(piece.rows, other and other.rows, of)
    if piece.into is not None:
        of = sorted({one.into.start for one in siblings if one.into is not None})
        found["into"] = _share(piece.into, other and other.into, of)
    if piece.transposed:
        found["transposed"] = True
    if piece.stacked:
        found["stacked"] = True
    if piece.order:
        field = f":{_heads_field(config, piece.heads)}" if piece.heads > 1 else ""
        found["order"] = piece.order + field
    return found


def _share(rows: Rows, other: Rows | None, starts: list[int]) -> list[Any]:
    if rows.step == 2:
        return ["0", "1", 2, rows.start]
    fractions = [Fraction(rows.start, rows.of), Fraction(rows.stop, rows.of)]
    if other is not None and fractions != [
        Fraction(end, other.of) for end in (other.start, other.stop)
    ]:
        return [starts.index(rows.start), len(starts)]
    return [str(fraction) for fraction in fractions]


def _starts(step: Step) -> dict[str, list[int]]:
    """Where the blocks of rows of each parameter begin."""
    found: dict[str, set[int]] = defaultdict(set)
    for pieces in step.pieces.values():
        for piece in pieces:
            if piece.rows is not None:
                found[piece.memory].add(piece.rows.start)
    return {name: sorted(starts) for name, starts in found.items()}


def _heads_field(config: PretrainedConfig, heads: int) -> str:
    """The field of a config that says how many heads there are."""
    values = config.to_dict()
    flat = {
        **{key: value for key, value in values.items() if isinstance(value, int)},
        **{
            f"{part}.{key}": value
            for part, inner in values.items()
            if isinstance(inner, dict) and "vision" in part
            for key, value in inner.items()
        },
    }
    names = [
        key for key, value in flat.items() if value == heads and "head" in key and "dim" not in key
    ]
    exact = [key for key in names if key.endswith("num_attention_heads")]
    return (exact or names)[-1]
