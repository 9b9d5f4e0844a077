"""--html: one page that needs nothing else, says what the terminal says, and harms nobody."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.files import small_lora
from helpers.pages import Page
from helpers.places import FIXTURES

import loratool
from loratool.notices import Notice
from loratool.rendering.page import page_of
from loratool.sheet import (
    Bars,
    CodeBlock,
    Curves,
    Facts,
    Heading,
    HeatMap,
    Line,
    Points,
    Sentence,
    Sheet,
    Toned,
    code,
    said,
    table_of,
)

EVIL = "<script>alert(1)</script>\x1b[31m&\"'\u202e</table>[/]"

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"


def commands(folder: Path) -> dict[str, list[object]]:
    """Every command that writes pages, as it is tried on the fixtures."""
    half = folder / "half"
    return {
        "resize": ["resize", ADAPTER, "--rank", "4", "-o", half],
        "inspect": ["inspect", ADAPTER, "--base", BASE],
        "compare": ["compare", ADAPTER, half],
        "combine": ["combine", ADAPTER, half, "-o", folder / "both"],
        "verify": ["verify", folder / "merged", "--base", BASE, ADAPTER],
        "extract": ["extract", "--rank", "2", BASE, folder / "merged", "-o", folder / "taken"],
        "lint": ["lint", ADAPTER, half, "--together", "--base", BASE],
        "list": ["list", folder],
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Page, str]]:
    """The page of each command, and what it printed."""
    folder = tmp_path_factory.mktemp("pages")
    loratool.merge(BASE, ADAPTER, folder / "merged", dtype="float32")
    found = {}
    for name, arguments in commands(folder).items():
        file = folder / f"{name}.html"
        ran = run_cli(*arguments, "--html", file, COLUMNS="300")
        assert ran.exit_code == 0, ran.stderr
        found[name] = Page(file.read_text()), ran.stdout
    return found


@pytest.mark.parametrize("command", commands(Path()))
def test_a_page_says_what_the_terminal_says(
    pages: dict[str, tuple[Page, str]], command: str
) -> None:
    """Every word and number of the answer is in the text of the page."""
    page, printed = pages[command]
    said = set(page.text.split())
    assert not [word for word in printed.split() if word not in said]


@pytest.mark.parametrize("command", commands(Path()))
def test_a_page_needs_nothing_else(pages: dict[str, tuple[Page, str]], command: str) -> None:
    """No script, no other file, no network; small, with a title and with charts that are named."""
    page, _ = pages[command]
    assert not page.named("script")
    assert not page.named("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"(#|data:image/png;base64,|$)", attributes.get(name, ""))
        assert not any(name.startswith("on") for name in attributes)
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert len(page.source) < 500_000
    images = [a for a in page.named("div") if a.get("role") == "img"]
    assert images
    assert all(image["aria-label"] for image in images)
    assert page.named("html")[0]["lang"] == "en"


def test_the_same_answer_is_the_same_page(tmp_path: Path) -> None:
    """No date, no random names of parts of charts."""
    for name in ("one.html", "two.html"):
        assert run_cli("inspect", ADAPTER, "--html", tmp_path / name).exit_code == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_every_text_is_escaped() -> None:
    """Whatever a file says, wherever it stands in a sheet, it is text on the page."""
    table = table_of(EVIL, "b", caption=EVIL)
    table.add(EVIL, Toned(EVIL, "bad"))
    sheet = Sheet(
        EVIL,
        [
            Facts([(EVIL, (EVIL, Toned(EVIL, "good")))]), table, Sentence(EVIL), Line(EVIL),
            Heading(EVIL), Points([EVIL, code(EVIL, EVIL)]), CodeBlock(EVIL, [EVIL, EVIL]),
            HeatMap(EVIL, [EVIL], [EVIL], [[1.0]], EVIL, EVIL),
            Curves(EVIL, EVIL, EVIL, [(EVIL, [1.0, 2.0], [1.0, 2.0]), (EVIL, [1.0], [1.0])]),
            Bars(EVIL, [EVIL], EVIL, [(EVIL, [1.0]), (EVIL, [2.0])]),
        ],
        [Notice(EVIL, EVIL, EVIL)],
        EVIL,
    )  # fmt: skip
    for sheets in ([sheet], [sheet, sheet]):
        page = Page(page_of(sheets))
        assert not page.named("script")
        assert "\x1b" not in page.source
        assert "\u202e" not in page.source
        assert "<script>" in page.text


def test_code_lists_links_and_headings_are_what_html_has_for_them() -> None:
    """A heading stands one below that of its sheet; lines of code stay lines."""
    link = code("org/base", "https://hub.example/org/base")
    lines = ["import torch", "  torch.ones(2)"]
    sheet = Sheet("card", [Heading("Use"), Points(["one", ("two ", link)]), CodeBlock("py", lines)])
    page = Page(page_of([sheet]))
    assert [kind for kind, _ in page.elements if kind in ("h2", "h3", "ul", "li", "pre")] == [
        "h2", "ul", "li", "li", "pre"]  # fmt: skip
    assert page.named("a") == [{"href": "https://hub.example/org/base"}]
    assert "<code>org/base</code></a>" in page.source
    assert "<code>" + "\n".join(lines) + "</code></pre>" in page.source
    both = Page(page_of([sheet, sheet]))
    assert (len(both.named("h2")), len(both.named("h3"))) == (2, 2)


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "file:///etc/passwd", "//x", 'https://x" onclick="y', ""]
)
def test_only_addresses_of_the_web_become_links(address: str) -> None:
    """Whatever else a file gives for one, its text stands alone."""
    page = Page(page_of([Sheet("card", [said("see ", code("x", address))])]))
    assert not page.named("a")
    assert "see x" in page.text


def test_hostile_names_reach_a_page_as_text(tmp_path: Path) -> None:
    """The name of a folder, and what a config says."""
    lora = small_lora(tmp_path / "<img src=x onerror=alert(1)>")
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "<script>x</script>"
    (lora / "adapter_config.json").write_text(json.dumps(config))
    assert run_cli("inspect", lora, "--html", tmp_path / "page.html").exit_code == 0
    page = Page((tmp_path / "page.html").read_text())
    assert not page.named("img")
    assert not page.named("script")


def test_several_adapters_are_sections_of_one_page(tmp_path: Path) -> None:
    """Each with its name as a heading."""
    one, two = small_lora(tmp_path / "one"), small_lora(tmp_path / "two")
    assert run_cli("inspect", one, two, "--html", tmp_path / "page.html").exit_code == 0
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.named("h2")) == 2


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("--html", "page.txt", "must end in .html"),
        ("--html", "adapter_model.safetensors", "must end in .html"),
        ("--html", "none/page.html", "there is no directory"),
        ("--html", "folder.html", "is a directory"),
        ("--plot", "chart.jpg", "must end in .png, .svg, .pdf"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, option: str, name: str, said: str
) -> None:
    """In one error, with nothing made."""
    (tmp_path / "folder.html").mkdir()
    ran = run_cli("resize", ADAPTER, "--rank", "2", "-o", tmp_path / "out", option, tmp_path / name)
    assert ran.exit_code != 0
    assert said in ran.stderr
    assert "hint:" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?")]
)
def test_plot_writes_the_charts_alone(tmp_path: Path, ending: str, start: bytes) -> None:
    """As what the name's ending says, the same bytes each time; JSON stays JSON."""
    made = []
    for number in range(2):
        file = tmp_path / f"{number}.{ending}"
        ran = run_cli("inspect", ADAPTER, "--json", "--plot", file)
        assert ran.exit_code == 0
        assert ran.stdout.startswith("{")
        made.append(file.read_bytes())
    assert made[0].startswith(start)
    assert made[0] == made[1]


def test_without_matplotlib_a_page_has_no_charts_and_a_plot_is_refused(tmp_path: Path) -> None:
    """Both say what to install."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    without = {"PYTHONPATH": ":".join([str(tmp_path), *sys.path]), "LORATOOL_NO_FORK": "1"}
    code = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'matplotlib' else real(n, *a)\n"
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    from helpers.forked import run_snippet

    page = tmp_path / "page.html"
    ran = run_snippet(code, ["inspect", str(ADAPTER), "--html", str(page)], without, Path.cwd())
    assert ran.code == 0, ran.err
    assert "loratool[plot]" in ran.err
    assert not Page(page.read_text()).named("figure")
    ran = run_snippet(
        code, ["inspect", str(ADAPTER), "--plot", str(tmp_path / "x.png")], without, Path.cwd()
    )
    assert ran.code == 2
    assert "loratool[plot]" in ran.err
