"""What a user should know beside the answer, and the one document that reports print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.text import printable_message


@dataclass(frozen=True)
class Notice:
    """Something a user should know: a stable `code`, a sentence, and where it was seen.

    `refused` marks what makes an adapter impossible to merge honestly: `inspect` shows it, `merge`
    stops on it. The message is made printable, as that of an error; `where` is the exact name.
    """

    code: str
    message: str
    where: str = ""
    refused: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable_message(self.message))

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "refused": self.refused,
        }


def document(report: Any, *lists: str) -> dict[str, Any]:
    """What `--json` prints of a report: its values, and at the end these lists of its parts."""
    fields = {name: value for name, value in report.__dict__.items() if name not in lists}
    parts = {name: [part.to_dict() for part in getattr(report, name)] for name in lists}
    return {"schema_version": 1, **fields, **parts}
