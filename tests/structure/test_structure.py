"""The shape of the package: floors, sizes, what an import costs."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Collection

import pytest
from helpers.places import ROOT

import loratool
from loratool.cli.main import cli

PACKAGE = ROOT / "loratool"


#: Folders and single files; imports go down this list only. A new module needs no entry here.
FLOORS = """
    __main__
    cli
    rendering
    verbs
    auditing cataloguing combining converting extracting publishing
    merging serving
    adapters
    models streams
    storage linalg
    sheet
    answers notices paths
    errors dtypes words version
    text
"""
LEVELS = {room: level for level, line in enumerate(FLOORS.split("\n")) for room in line.split()}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, "" for its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = ast.parse(path.read_text())
    return found


def imports_of(tree: ast.Module, known: Collection[str]) -> set[str]:
    """The modules of the package that a module imports, at its top or inside of a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loratool"):
            inside = (node.module or "").removeprefix("loratool").lstrip(".")
            for imported in node.names:
                whole = f"{inside}.{imported.name}".lstrip(".")
                names.add(whole if whole in known else inside)
        elif isinstance(node, ast.Import):
            names |= {n.name.removeprefix("loratool.") for n in node.names} & known
    return names


MODULES = modules()
IMPORTS = {name: imports_of(tree, MODULES.keys()) for name, tree in MODULES.items() if name}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_imports_go_down_the_floors_only() -> None:
    """No folder imports one of its own floor or above."""
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(name) != room(other) and LEVELS[room(name)] >= LEVELS[room(other)]
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    """The imports of the package form no circle, so neither do those inside of a folder."""
    below = dict(IMPORTS)
    while below:
        free = {name for name, others in below.items() if not others & below.keys() - {name}}
        assert free, sorted(below)
        below = {name: others for name, others in below.items() if name not in free}


def test_only_adapters_know_a_dialect_by_name() -> None:
    """What a dialect alone knows is filled into the adapter, and asked nowhere else."""
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if other.startswith("adapters.dialects.peft") and room(name) != "adapters"
    ]
    assert not wrong


def test_every_module_says_what_it_is_for() -> None:
    """The first line of a module is a sentence that `docs/modules.py` can print."""
    for name, tree in MODULES.items():
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert len(first) > 10, name
        assert first.endswith((".", "?", ":")), name


def test_no_module_is_too_long_to_read() -> None:
    """A module reads from top to bottom in one sitting."""
    long = {p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 350}
    assert not long


def test_scripts_beside_the_package_import_what_is_there() -> None:
    """Benchmarks and the scripts of fixtures and docs name modules that exist, also in snippets."""
    for path in sorted(ROOT.glob("[bdf]*/*.py")):
        for home in re.findall(r"(?:from|import) loratool\.([\w.]+)", path.read_text()):
            assert home in MODULES, f"{path.name}: loratool.{home}"


def test_a_public_name_is_defined_once() -> None:
    """The name of a class or a function means one thing in the whole package."""
    homes: dict[str, list[str]] = {}
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


#: Commands that are about the command line itself: no verb of the library, no report.
COMMANDS_OF_ITS_OWN = {"completion"}


def function_of(verb: str) -> str:
    """The name of a verb's function: its own, but where Python has a function of that name."""
    name = loratool.NAMED_OTHERWISE.get(verb, verb)
    assert (name == verb) == (verb not in dir(builtins))
    return name


def test_each_command_has_one_word_everywhere() -> None:
    """Every verb has a function, a command, a module in `cli`, `verbs` and `rendering`; what is
    about the command line itself has one in `cli` alone."""
    for verb in loratool.VERBS:
        assert {f"{folder}.{verb}" for folder in ("cli", "verbs", "rendering")} <= MODULES.keys()
        assert callable(getattr(loratool, function_of(verb)))
    assert set(cli.commands) == set(loratool.VERBS) | COMMANDS_OF_ITS_OWN
    for command in COMMANDS_OF_ITS_OWN:
        assert f"cli.{command}" in MODULES
        assert not {f"verbs.{command}", f"rendering.{command}"} & MODULES.keys()


def test_only_the_console_and_the_command_line_print() -> None:
    """The library returns values; it never writes to the terminal."""
    printers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert not printers


#: Who may write to a stream, and the functions of it that do.
WRITERS = {"rendering.terminal": ("_print_exactly",), "cli.process": ("say", "print_answer")}


def test_text_goes_to_streams_through_three_functions() -> None:
    """Nobody else writes to stdout or stderr, or asks Rich or click to; Rich reads no markup of
    names, because what `verbatim` gives has none."""
    wrong = []
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                sources = [getattr(node, "module", None) or "", *(n.name for n in node.names)]
                rich = {s for s in sources if s.startswith("rich.")}
                if rich and name != "rendering.terminal" and name != "rendering.drawing":
                    wrong.append(f"{name} imports {rich}")
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            call = ast.unparse(node.func)
            if call == "os.write" and name == "storage.system":  # into files, by position
                continue
            if call in ("click.echo", "click.secho", "click.style", "os.write", "Console"):
                wrong.append(f"{name} calls {call}")
            written = r"sys\.(stdout|stderr|__std\w+__)(\.buffer)?\.write(lines)?"
            may = "".join(ast.unparse(_function(tree, f)) for f in WRITERS.get(name, ()))
            if re.fullmatch(written, call) and call not in may:
                wrong.append(f"{name} calls {call}")
    assert not wrong


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


#: The modules that give an answer or a card a form; all others say what it says.
FORMS = {
    *(f"rendering.{form}" for form in ("terminal", "drawing", "page", "plots", "notebook")),
    "publishing.cards.markdown",
}
#: Those that put what was drawn where it belongs.
DRAWN_BY = {"rendering.answering", "rendering.card", "publishing.cards.document"}


def test_only_forms_know_what_an_answer_looks_like() -> None:
    """What a report or a card says becomes a sheet, in no form: so each form alone makes texts of
    files fit to be shown in it, and none is forgotten."""
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others & FORMS
        if room(name) != "cli" and name not in FORMS | DRAWN_BY
    ]
    assert not wrong


#: Signs that are Markdown, and functions that make a text fit to be shown.
MARKDOWN = re.compile(r"`|\*\*|\]\($|^##+ |^\| ")
FITTED = {"printable", "printable_code", "escaped"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def test_what_a_card_says_is_in_no_form() -> None:
    """No other module of cards writes Markdown, or makes a text fit to be shown."""
    for name, tree in MODULES.items():
        if not name.startswith("publishing.") or name in FORMS:
            continue
        nodes = list(ast.walk(tree))
        shown = {n.name for node in nodes if isinstance(node, ast.ImportFrom) for n in node.names}
        assert not shown & FITTED, name
        if name.startswith("publishing.cards."):
            told = {ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, DOCUMENTED)}
            texts = {n.value for n in nodes if isinstance(n, ast.Constant)} - told
            assert not [t for t in texts if isinstance(t, str) and MARKDOWN.search(t)], name


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import loratool", ["numpy", "torch", "click", "rich"]),
        ("import loratool.cli.main", ["numpy", "torch", "rich", "huggingface_hub"]),
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
    assert all(getattr(loratool, name) is not None for name in loratool.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        loratool.nothing  # noqa: B018


#: What only POSIX has; `storage.system` has another way beside each.
POSIX = {"preadv", "pread", "pwrite", "fdatasync", "O_CLOEXEC", "O_NONBLOCK", "fcntl", "fork"}


def test_names_of_posix_stand_in_one_module() -> None:
    """Whoever reads, writes, locks and flushes by the system does so through `storage.system`."""
    for name, tree in MODULES.items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        assert name == "storage.system" or not used & POSIX, name
