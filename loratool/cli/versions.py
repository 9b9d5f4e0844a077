"""`loratool --version`: loratool and what its answers depend on, for reports of bugs.

Nothing here is imported slowly: the versions are those of the installed packages, none of which is
imported for it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata

from loratool.cli.process import was_heard
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


def answers_versions(arguments: Sequence[str]) -> bool:
    """Answer a call that asks for versions and nothing else, before the commands are imported.

    False where it asks for something else, or stdout does not take the answer: then the command
    line as a whole knows what to do.
    """
    if "--version" not in arguments or not {"--version", "--json"} >= set(arguments):
        return False
    return was_heard(versions_text("--json" in arguments))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
