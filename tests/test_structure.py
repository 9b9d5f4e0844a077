"""The shape of the package: floors, sizes, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "loratool"


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    found.pop("__init__")
    return found


def imports_of(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loratool"):
            inner = (node.module or "").removeprefix("loratool").lstrip(".")
            names |= {f"{inner}.{a.name}" if inner else a.name for a in node.names} | {inner}
    return names


def test_no_module_imports_itself_in_a_circle() -> None:
    """The imports of the package form no circle."""
    below = {name: imports_of(tree) for name, tree in modules().items()}
    while below:
        free = {name for name, others in below.items() if not others & below.keys() - {name}}
        assert free, sorted(below)
        below = {name: others for name, others in below.items() if name not in free}


def test_only_the_console_and_the_command_line_print() -> None:
    """The library returns values; it never writes to the terminal."""
    printers = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert not printers


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import loratool", ["numpy", "torch", "click", "rich"]),
        ("import loratool.cli", ["numpy", "torch", "rich", "huggingface_hub"]),
        ("import loratool; loratool.inspect('fixtures/adapter')", ["torch", "transformers"]),
        (
            "import loratool; loratool.inspect('fixtures/adapter', base='fixtures/base')",
            ["torch", "transformers"],
        ),
    ],
)
def test_imports_are_lazy(code: str, absent: list[str]) -> None:
    """Help and inspect start without torch; importing the package costs nothing."""
    check = f"import sys; {code}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    """Everything in `__all__` can be imported, and an unknown name is an AttributeError."""
    import loratool

    assert all(getattr(loratool, name) is not None for name in loratool.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        loratool.nothing  # noqa: B018
