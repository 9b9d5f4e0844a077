"""Make the pictures of README and docs, from the fixtures: `python docs/pictures.py`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"

#: Each picture, and the command that draws it; {work} is a folder that goes afterwards.
COMMANDS = {
    "resize": ["resize", "fixtures/adapter", "--energy", "0.9", "--patterns", "-o", "{work}/small"],
    "inspect": ["inspect", "fixtures/adapter", "--base", "fixtures/base"],
    "compare": ["compare", "fixtures/adapter", "fixtures/tasks/html", "fixtures/tasks/tables"],
    "extract": ["extract", "fixtures/base", "fixtures/tuned", "--rank", "8", "-o", "{work}/taken"],
}


def draw(folder: Path) -> None:
    """Write all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, command in COMMANDS.items():
            words = [word.replace("{work}", work) for word in command]
            plot = ["--plot", str(folder / f"{name}.svg")]
            subprocess.run(
                [sys.executable, "-m", "loratool", *words, "-q", *plot],
                cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip


if __name__ == "__main__":
    draw(PICTURES)
