"""How places on the Hub are written: `org/name`, `org/name@revision`, `hf://org/name/folder`."""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from loratool.errors import FileError

SCHEME = "hf://"
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?/?")
#: With a scheme the oldest models need no owner: hf://gpt2.
_ADDRESS = re.compile(
    r"(?P<repo>[^/@\s]+/[^/@\s]+|[^/@\s]+)(@(?P<revision>refs/(pr|convert)/[^/@\s]+|[^/@\s]+))?"
    r"(/(?P<path>.+?))?/?"
)
#: A page as a browser shows it.
_PAGE = re.compile(
    r"/(?P<repo>[^/]+/[^/]+)(/(tree|blob|resolve)/(?P<revision>refs/(pr|convert)/[^/]+|[^/]+)"
    r"(/(?P<path>.+?))?)?/?"
)
#: A path with such an ending means a file on the disk.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf", ".zip")
_FORMS = "Write org/name, org/name@revision, or hf://org/name/folder."


class Address(NamedTuple):
    """A repository, a revision of it, and a folder or a file inside."""

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"@{self.revision}" if self.revision else "")
        if self.path:
            return f"{SCHEME}{text}/{self.path}"
        return text if "/" in self.repo else SCHEME + text


def parse(text: str) -> Address | None:
    """The address that `org/name`, `org/name@revision` or `hf://org/name/sub/folder` stands for.

    The URL of a Hub page means the model on that page. None if the text can only be a path. Raises
    FileError for an `hf://` and a URL that are none.
    """
    if text.startswith(("http://", "https://")):
        return _of_page(text)
    if text.lower().startswith("hf:"):
        plain = text[3:].lstrip("/").removeprefix("models/")
        found = _ADDRESS.fullmatch(plain)
        other = plain.startswith(("datasets/", "spaces/", "buckets/"))
        if found is None or other or ".." in (found["path"] or "").split("/"):
            what = "only repositories of models are read" if other else "not an address on the Hub"
            raise FileError(f"{text}: {what}.", _FORMS)
        revision = found["revision"] and unquote(found["revision"])
        return Address(found["repo"], revision, found["path"] or "")
    found = _ID.fullmatch(text)
    if found is None or text.lower().endswith(_FILES):
        return None
    return Address(found["repo"], found["revision"])


def _of_page(text: str) -> Address:
    url = urlsplit(text)
    hosts = {"huggingface.co", "hf.co", urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    found = _PAGE.fullmatch(unquote(url.path)) if url.netloc in hosts else None
    if found is None or found["repo"].startswith(("datasets/", "spaces/")):
        raise FileError(f"{text}: not the page of a model on the Hub.", _FORMS)
    return Address(found["repo"], found["revision"], found["path"] or "")


def other_reading(text: str) -> str:
    """A hint for a path that is not there, where somebody may have meant a place on the Hub."""
    parts = text.rstrip("/").split("/")
    if text.startswith((".", "/", "~")) or not all(re.fullmatch(r"[\w.-]+", p) for p in parts):
        return ""
    if len(parts) > 2:
        return f" On the Hub it would be {SCHEME}{'/'.join(parts)}."
    return (
        " Ids on the Hub are org/name." if len(parts) == 1 and not os.path.splitext(text)[1] else ""
    )
