"""What of a run is done: an entry for each finished file, which outlives the process.

Nothing here needs a lock: an entry is a file that is renamed into its place, after the file that it
speaks of was flushed and renamed into its own. So what is half-written has no entry, and of two
processes that made the same file, which has the same bytes then, either entry will do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import FileError
from loratool.storage.fields import COUNT, TABLE, TEXT, check_fields
from loratool.storage.hashing import file_digest
from loratool.storage.jsonfile import read_json
from loratool.storage.system import sync

_ENTRY = {"nbytes": COUNT, "changed": COUNT, "digest": TEXT, "note": TABLE}
_ORDER = {
    "version": COUNT, "command": TEXT, "arguments": TABLE, "made_of": TABLE, "files": TABLE,
}  # fmt: skip

#: Of the two kinds of file above.
_VERSION = 1


@dataclass(frozen=True)
class WorkOrder:
    """What an output is made by: `made_of` is equal for runs that make the same bytes.

    `arguments` are those of the library's function `command`, for whoever finishes it. `files` are
    the names of what is made one by one, with their bytes.
    """

    command: str
    arguments: dict[str, Any]
    made_of: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, **self.__dict__}

    def differences(self, other: WorkOrder) -> list[str]:
        """In words, what `other` is made of that this is not; [] for what makes the same."""
        if self.command != other.command:
            return [f"the command: {self.command}, not {other.command}"]
        before, now = _flat(as_json(self.made_of)), _flat(as_json(other.made_of))
        return [
            f"{name}: {_short(before.get(name))}, not {_short(now.get(name))}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _flat(table: Any, name: str = "") -> dict[str, Any]:
    if isinstance(table, dict) and table:
        parts = [_flat(value, f"{name}, {key}" if name else key) for key, value in table.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {name: table}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def read_order(path: Path) -> WorkOrder | None:
    """The order in a file; None where there is none, or one that this version does not write."""
    try:
        found = read_json(path)
        check_fields(found, _ORDER, path)
    except (FileError, OSError):
        return None
    if found.get("version") != _VERSION or not all(name in found for name in _ORDER):
        return None
    return WorkOrder(**{name: value for name, value in found.items() if name != "version"})


class Journal:
    """The entries in the folder `done`, of files in any of several folders.

    Use with files that are not changed any more.
    """

    def __init__(self, done: Path) -> None:
        self._done = done

    def note_of(self, name: str, places: Sequence[Path]) -> dict[str, Any] | None:
        """What was noted of a finished file in one of these folders; None if it is not finished.

        A file that is not any more as it was has no entry: by its size, and by its hash where its
        time of change is another one.
        """
        entry = self._entry(name)
        if entry is None:
            return None
        for place in places:
            with suppress(OSError):
                there = os.stat(place / name)
                if there.st_size != entry["nbytes"]:
                    return None
                same = there.st_mtime_ns == entry["changed"]
                if same or file_digest(place / name) == entry["digest"]:
                    note: dict[str, Any] = entry["note"]
                    return note
                return None
        return None

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, whatever became of its file."""
        return self._entry(name) is not None

    def _entry(self, name: str) -> dict[str, Any] | None:
        path = self._done / f"{name}.json"
        try:
            found = read_json(path)
            check_fields(found, _ENTRY, path)
        except (FileError, OSError):
            return None
        return found if all(part in found for part in _ENTRY) else None

    def enter(self, fresh: Path, place: Path, digest: str, note: Mapping[str, Any]) -> None:
        """Move a finished and flushed file into the folder `place`, and write its entry."""
        there = os.stat(fresh)
        os.replace(fresh, place / fresh.name)
        sync(place)
        entry = {
            "nbytes": there.st_size, "changed": there.st_mtime_ns, "digest": digest,
            "note": dict(note),
        }  # fmt: skip
        replace_json(
            self._done / f"{fresh.name}.json", fresh.with_name(f"{fresh.name}.json"), entry
        )


def replace_json(path: Path, fresh: Path, document: Any) -> None:
    """Write a JSON file in one step, by way of `fresh`, a name that no other process uses."""
    with fresh.open("x", encoding="utf-8") as stream:
        json.dump(document, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
