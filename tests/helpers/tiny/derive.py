"""Derive the table of layouts from transformers, and hold it against all names of all classes.

PYTHONPATH=tests:. python -m helpers.tiny.derive --write     writes loratool's layouts.json
PYTHONPATH=tests:. python -m helpers.tiny.derive --check     says whether it is still the same
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.tiny.cases import CASES
from helpers.tiny.reading_off import Piece, Rows
from helpers.tiny.reversal import Reversal, Step
from helpers.tiny.survey import Survey, spellings_of
from loratool.models.layouts import table as tables
from loratool.models.layouts.shares import Share
from loratool.models.layouts.table import Names, Segment

Spellings = dict[str, tuple[dict[str, Any], list[Step]]]
PATH = Path(tables.__file__).with_name("layouts.json")


def survey(names: Iterable[str]) -> Survey:
    """What these cases tell."""
    transformers.utils.logging.set_verbosity_error()
    found = Survey()
    for name in names:
        found.add(name, CASES[name])
    return found


def spelled(names: Iterable[str]) -> Spellings:
    """What these cases' tensors may be called."""
    transformers.utils.logging.set_verbosity_error()
    return {name: spellings_of(Reversal(CASES[name].make())) for name in names}


def text_of(data: dict[str, Any]) -> str:
    """The table as it is written: a line for each group."""
    groups = ",\n".join(json.dumps(group, separators=(",", ":")) for group in data["groups"])
    return f'{{"transformers":"{data["transformers"]}","groups":[\n{groups}\n]}}\n'


def faults(found: Spellings, data: dict[str, Any]) -> Iterator[str]:
    """Every name of every class that the table does not read as transformers does."""
    table = tables.read_table(data)
    for name, (config, steps) in found.items():
        for step in steps:
            names = Names(config, step.after, table)
            for disk, pieces in step.pieces.items():
                segments = names.segments(disk)
                if not _same(segments, pieces, step.before, step.after[disk]):
                    yield f"{name}: {disk} is {pieces}, read as {segments}"


def _same(
    segments: tuple[Segment, ...], pieces: list[Piece], memory: Any, disk: tuple[int, ...]
) -> bool:
    """Whether segments say what the numbers said, down to the rows."""
    if len(segments) != len(pieces):
        return False
    by_name = {(segment.memory, segment.expert): segment for segment in segments}
    for piece in pieces:
        segment = by_name.get((piece.memory, piece.expert))
        if segment is None or segment.transposed != piece.transposed:
            return False
        if segment.order.partition(":")[0] != piece.order or segment.stacked != piece.stacked:
            return False
        if not _same_rows(segment.rows, piece.rows) or not _same_rows(segment.into, piece.into):
            return False
    return True


def _same_rows(share: Share | None, rows: Rows | None) -> bool:
    if share is None or rows is None:
        return share is rows
    if share.index is not None:
        return share.count > 1
    return share.of(rows.of) == range(rows.start, rows.stop, rows.step)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--write", action="store_true", help="write the table")
    wanted.add_argument("--check", action="store_true", help="compare with the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = survey(CASES)
    data = found.table()
    wrong = list(faults(found.spellings, data))
    for line in wrong:
        print(line)
    print(f"{len(found.spellings)} classes, {len(data['groups'])} groups, split: {found.split}")
    if arguments.write:
        PATH.write_text(text_of(data), "utf-8")
        return int(bool(wrong))
    same = text_of(data) == PATH.read_text("utf-8")
    print("the same" if same else "the table is another one")
    return int(bool(wrong) or not same)


if __name__ == "__main__":
    sys.exit(main())
