"""`loratool --version`: loratool and what its answers depend on, for reports of bugs.

Nothing here is imported slowly: the versions are those of the installed packages, none of which is
imported for it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from loratool.cli.process import print_answer, say
from loratool.errors import AnswerLost
from loratool.version import __version__

#: Packages by the names that they are installed by.
_PACKAGES = ("torch", "safetensors", "huggingface-hub", "numpy")


def versions_text(as_json: bool) -> str:
    """The versions as lines of two columns, or as one JSON document."""
    found = {
        "loratool": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: _installed(name) for name in _PACKAGES},
        "platform": platform.platform(),
    }
    if as_json:
        return json.dumps({"schema_version": 1, **found}, indent=2)
    width = max(map(len, found)) + 2
    lines = (f"{name:<{width}}{version or 'not installed'}" for name, version in found.items())
    return "\n".join(lines)


def answer_versions(arguments: Sequence[str]) -> None:
    """Answer a call that asks for versions and nothing else, and end the process; return for any
    other, which the command line as a whole answers."""
    if "--version" not in arguments or not {"--version", "--json"} >= set(arguments):
        return
    as_json = "--json" in arguments
    refused = print_answer(versions_text(as_json))
    if refused is None:
        sys.exit()
    if isinstance(refused, BrokenPipeError):
        os._exit(0)
    lost = AnswerLost(refused.strerror or str(refused))
    say(json.dumps(lost.to_dict()) if as_json else f"error: {lost.message}")
    os._exit(lost.exit_code)  # Python would try to print it once more


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
