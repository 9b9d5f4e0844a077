"""What was written of a model, shard by shard, and where shards are while others are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loratool.merging.counts import Counts


@dataclass
class Written:
    """What was written: digests by shard, what rounding did, and what a recorder noted by shard."""

    shards: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    recorded: dict[str, Any] = field(default_factory=dict)

    def __iadd__(self, other: Written) -> Written:
        self.shards |= other.shards
        self.counts += other.counts
        self.recorded |= other.recorded
        return self

    @classmethod
    def noted(cls, name: str, note: dict[str, Any]) -> Written:
        """One shard, by the note that was made of it."""
        recorded = {name: note["recorded"]} if note.get("recorded") is not None else {}
        return cls({name: note["digest"]}, Counts(**note["counts"]), recorded)


class ShardPlace(Protocol):
    """Where shards are made (`own`), and where they are when they are `finished`; a work folder.

    Each shard has a note, which is there from when it is finished until the output is complete.
    """

    @property
    def own(self) -> Path: ...
    @property
    def finished(self) -> Path: ...
    def note_of(self, name: str) -> dict[str, Any] | None: ...
    def publish(self, name: str, digest: str, note: dict[str, Any], *parts: str) -> None: ...
