"""The pictures of README and docs are those that the script makes, of commands that work."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from helpers.places import ROOT


@pytest.mark.long
def test_the_pictures_are_there_and_each_is_shown(tmp_path: Path) -> None:
    """One of each command in `docs/pictures.py`, drawn anew without an error, and shown in
    README or in a document; those of terminals say what the commands say today."""
    script = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    script["draw"](tmp_path)
    names = {f"{name}.svg" for name in (*script["PLOTS"], *script["ANSWERS"])}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} == names
    texts = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    )
    assert set(re.findall(r"pictures/(\w+\.svg)", texts)) == names
    for name in script["ANSWERS"]:
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8"), (
            name
        )
