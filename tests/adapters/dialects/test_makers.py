"""Do the libraries of the dialects still write what is committed, and merge it so?"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
from helpers.dialects import DIALECTS

pytestmark = pytest.mark.dialects


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(DIALECTS))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(DIALECTS))


def _is_here(script: str) -> bool:
    """Whether what a script takes is here. Both are no packages that an extra can name (llama.cpp's
    script lies in a source distribution, the cookbook needs one that nobody can install), so
    .ci/dialects fetches them: in CI their absence is a failure. The fixtures themselves are read in
    every run of the tests."""
    if script == "make_tinker":
        return find_spec("tinker_cookbook") is not None
    return script != "make_gguf" or "LLAMA_CPP" in os.environ


@pytest.mark.parametrize(
    "script",
    ["make_peft", "make_hand", "make_mlx", "make_loralib", "make_tinker", "make_gguf"],
)
def test_fixtures_are_made_anew(script: str) -> None:
    """The same files, and the same changes of their bases, by the libraries of the extra."""
    if not _is_here(script):
        # llama.cpp's script is in a source distribution alone, and the cookbook is installed
        # without what it depends on: neither can be said in an extra. In CI `.ci/dialects` fetches
        # both, and there a missing one is a failure.
        assert "CI" not in os.environ, "run it by .ci/dialects, which fetches what it takes"
        pytest.skip(f"{script} takes what .ci/dialects fetches, and no extra can name")
    _script(script)
    assert _script("making").apart(script) == []
