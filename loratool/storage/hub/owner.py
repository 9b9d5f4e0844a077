"""The repositories of a user or an organisation on the Hub."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratool.errors import FileError, HubError
from loratool.storage.hub.address import Address
from loratool.storage.hub.errors import explained
from loratool.storage.hub.patience import answered

_NAME = re.compile(r"\w[\w.-]{0,95}")
#: More repositories than this of one owner are not looked at.
MOST_REPOSITORIES = 500


@dataclass(frozen=True)
class Owned:
    """A repository by its id, and when something was committed last (ISO 8601, UTC)."""

    repo: str
    changed: str | None


def repositories_of(owner: str) -> tuple[list[Owned], bool]:
    """The model repositories of an owner that this login may see, and whether there are more.

    Raises HubError where there is no such owner, or none of its models can be seen.
    """
    if not _NAME.fullmatch(owner):
        raise FileError(f"{owner}: no name of a user or an organisation.", "Check the path.")
    with explained(Address(owner)):
        found = answered(partial(_asked, owner), f"the models of {owner}")
    wanted = re.compile(re.escape(owner) + r"/\w[\w.-]*", re.IGNORECASE)
    repos = [
        Owned(info.id, _changed(info))
        for info in found
        if isinstance(info.id, str) and wanted.fullmatch(info.id)
    ]
    if not repos:
        raise HubError(
            f"{owner}: no user or organisation on the Hub with models that you may see.",
            "Check the name; models of a private kind want a login: hf auth login.",
        )
    return repos[:MOST_REPOSITORIES], len(repos) > MOST_REPOSITORIES


def _asked(owner: str) -> list[Any]:
    from huggingface_hub import HfApi

    found = HfApi().list_models(author=owner, limit=MOST_REPOSITORIES + 1, full=True)
    return list(itertools.islice(found, MOST_REPOSITORIES + 1))


def _changed(info: Any) -> str | None:
    moment = getattr(info, "last_modified", None)
    return moment.isoformat().replace("+00:00", "Z") if moment is not None else None
