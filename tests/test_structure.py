"""The shape of the package: floors, sizes, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "loratool"

VERBS = (
    "inspect", "merge", "verify", "unmerge", "combine", "resize", "compare", "extract", "push",
    "card",
)  # fmt: skip

#: Imports go from a floor to lower ones only; modules of one floor know nothing of each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {f"commands.{verb}" for verb in VERBS} | {"commands"},
    {f"console.{verb}" for verb in VERBS},
    {"console.changes"},
    {"console.common", "console"},
    {"inspecting", "merging", "unmerging", "verifying", "combining", "resizing", "comparing",
     "extracting", "pushing", "describing"},
    {"shipping"},
    {"extracted_output", "extraction_report", "licensing", "parcel", "push_target"},
    {"held", "publishing"},
    {"cards.making", "cards"},
    {"cards.parts"},
    {"cards.history", "cards.usage"},
    {"cards.facts"},
    {"adapter_output", "pairing", "subtraction", "extraction"},
    {"output", "changes"},
    {"executor", "restoring", "sampling", "checking", "attesting"},
    {"recording", "ways"},
    {"streaming", "reversal", "findings"},
    {"arithmetic", "differences"},
    {"rounding"},
    {"planning", "provenance", "inputs", "beside", "base_weights"},
    {"joining", "relations"},
    {"tying"},
    {"plan", "counterparts"},
    {"matching", "grouping"},
    {"formats", "formats.peft", "formats.peft_config", "formats.peft_writer", "formats.recognise",
     "formats.peft_targets"},
    {"adapter"},
    {"checkpoint.layout", "checkpoint.sidefiles"},
    {"checkpoint.undo"},
    {"checkpoint.base", "checkpoint.writer"},
    {"checkpoint.pickled", "checkpoint.hub"},
    {"checkpoint.header", "checkpoint.folder", "checkpoint.answers"},
    {"checkpoint.address"},
    {"checkpoint.tensors", "checkpoint.config", "checkpoint.residual", "checkpoint"},
    {"linalg.methods"},
    {"linalg.angles", "linalg.ranks", "linalg.sparsify", "linalg.dense", "linalg.intruders",
     "linalg.truncation"},
    {"linalg.lowrank", "linalg.spectrum", "linalg.krylov", "linalg"},
    {"workers", "folding", "options", "selection"},
    {"threads", "errors"},
]  # fmt: skip
#: Siblings that may import each other.
FAMILIES = [next(floor for floor in FLOORS if "formats" in floor)]


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
            names |= {inner} if inner else {a.name for a in node.names} - {"__version__"}
    return names


def test_every_module_has_a_floor() -> None:
    """A new module must be given its place here."""
    assert set(modules()) == set().union(*FLOORS)


def test_imports_go_down_only() -> None:
    """No module imports one of its own floor or above, but for families of formats."""
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imports_of(tree)
        if level[other] <= level[name]
        and not any(name in family and other in family for family in FAMILIES)
    ]
    assert not wrong


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
