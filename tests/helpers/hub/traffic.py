"""Requests as they are logged, faults as tests arrange them, and answers that are errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Record:
    """One request and what became of it; `status` stays 0 when there was no answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Rule:
    """Something a test arranged for requests that match."""

    kind: str
    pattern: str
    method: str | None = None
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after: int = 0
    pause: float = 0.0
    side: str | None = None
    reset: bool = False
    body: bytes = b""
    callback: Callable[[], object] | None = None

    def matches(self, kind: str, record: Record) -> bool:
        return (
            self.times > 0
            and self.kind == kind
            and self.method in (None, record.method)
            and re.search(self.pattern, record.path) is not None
        )


class Refusal(Exception):
    """An answer that is an error, worded and coded as the Hub does."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} if message else {}
        if code:
            self.headers["X-Error-Code"] = code
        self.headers.update(extra.pop("headers", {}))
        self.body = {"error": message, **extra}
