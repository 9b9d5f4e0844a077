"""What the Hub says of a repository, looked at before any of it becomes a path of the cache."""

from __future__ import annotations

import re
from typing import Any

from loratool.errors import HubError

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: What is in no name that a system, a terminal or the Hub takes: control characters, halves of
#: characters, and what Windows takes for a slash.
_NO_NAME = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\\\]")
#: Larger files, longer names and more of them are on no Hub.
_LARGEST, _LONGEST, _MOST = 1 << 50, 2_000, 2_000_000


def commit_of(info: Any, repo: str) -> str:
    """The commit that an answer is of. Raises HubError for what is no commit's id."""
    commit = getattr(info, "sha", None)
    if not is_commit(commit):
        raise _odd(repo, f"the commit {str(commit)[:60]!a}")
    return str(commit)


def is_commit(text: object) -> bool:
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def files_of(info: Any, repo: str) -> dict[str, Any]:
    """The files that an answer lists, by name. Raises HubError for names that are no places in a
    repository, and for sizes that no file has."""
    found: dict[str, Any] = {}
    siblings = info.siblings or []
    if len(siblings) > _MOST:
        raise _odd(repo, f"{len(siblings):,} files")
    for file in siblings:
        name, size = file.rfilename, file.size
        if not _is_place(name) or name in found:
            raise _odd(repo, f"a file {str(name)[:60]!a}")
        if size is not None and (type(size) is not int or not 0 <= size <= _LARGEST):
            raise _odd(repo, f"a file {name[:60]!a} of {str(size)[:30]} bytes")
        found[name] = file
    return found


def _is_place(name: object) -> bool:
    """Whether it can be a file in a folder, whatever the folder."""
    if not isinstance(name, str) or len(name) > _LONGEST or _NO_NAME.search(name):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in name.split("/"))


def _odd(repo: str, what: str) -> HubError:
    return HubError(
        f"{repo}: the Hub answered oddly: {what}.",
        "Try again; if it stays, check HF_ENDPOINT, or tell its owner.",
    )
