"""How places on the Hub are written: `org/name`, `org/name@revision`, `hf://org/name/folder`."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from loratool.errors import FileError

SCHEME = "hf://"
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")
_ADDRESS = re.compile(
    r"(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>refs/(pr|convert)/[^/@\s]+|[^/@\s]+))?"
    r"(/(?P<path>.+?))?/?"
)
#: A path with such an ending means a file on the disk.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf", ".zip")


class Address(NamedTuple):
    """A repository, a revision of it, and a folder or a file inside."""

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"@{self.revision}" if self.revision else "")
        return f"{SCHEME}{text}/{self.path}" if self.path else text


def parse(text: str) -> Address | None:
    """The address that `org/name`, `org/name@revision` or `hf://org/name/sub/folder` stands for.

    None for what can only be a path. Raises FileError for an `hf://` that is none.
    """
    if text.startswith(SCHEME):
        found = _ADDRESS.fullmatch(text.removeprefix(SCHEME).removeprefix("models/"))
        if found is None or ".." in (found["path"] or "").split("/"):
            raise FileError(
                f"{text}: not an address on the Hub.",
                "Write hf://org/name, hf://org/name@revision or hf://org/name/folder.",
            )
        revision = found["revision"] and unquote(found["revision"])
        return Address(found["repo"], revision, found["path"] or "")
    found = _ID.fullmatch(text)
    if found is None or text.lower().endswith(_FILES):
        return None
    return Address(found["repo"], found["revision"])
