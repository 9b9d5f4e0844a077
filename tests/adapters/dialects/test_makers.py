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


@pytest.mark.parametrize(
    "script",
    [
        "make_peft",
        "make_hand",
        "make_mlx",
        "make_loralib",
        pytest.param(
            "make_tinker",
            marks=pytest.mark.skipif(find_spec("tinker_cookbook") is None, reason="its cookbook"),
        ),
        pytest.param(
            "make_gguf",
            marks=pytest.mark.skipif(
                "LLAMA_CPP" not in os.environ, reason="needs llama.cpp's script"
            ),
        ),
    ],
)
def test_fixtures_are_made_anew(script: str) -> None:
    """The same files, and the same changes of their bases, by the libraries of the extra."""
    _script(script)
    assert _script("making").apart(script) == []
