"""Print what every module of loratool is for: the first line of each.

python docs/modules.py
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "loratool"


def first_lines() -> dict[str, str]:
    """The first line of every module's docstring, by its path in the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[str(path.relative_to(PACKAGE))] = text.partition("\n")[0]
    return found


if __name__ == "__main__":
    for name, line in first_lines().items():
        print(f"{name:44} {line}")
