"""Pages in a real browser: nothing overflows, nothing is said on the console, everybody can read
them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.cli import run_cli
from helpers.files import small_lora
from helpers.places import FIXTURES

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

WIDTHS = (400, 800, 1600)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every command that writes one, and one of an adapter with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    half, both, merged = folder / "half", folder / "both", folder / "merged"
    evil = small_lora(folder / ("<b onclick=x>" + "very-long-name-" * 12))
    assert run_cli("merge", base, adapter, "-o", merged).exit_code == 0
    commands: dict[str, list[object]] = {
        "resize": ["resize", adapter, "--rank", "4", "-o", half],
        "combine": ["combine", adapter, half, "-o", both],
        "inspect": ["inspect", adapter, half, "--base", base, "--spectrum", "--full"],
        "compare": ["compare", adapter, half, both],
        "verify": ["verify", merged, "--base", base, adapter],
        "extract": ["extract", "--rank", "2", base, merged, "-o", folder / "taken"],
        "audit": ["inspect", adapter, "--audit", "--base", base],
        "lint": ["lint", adapter, half, "--together"],
        "list": ["list", folder],
        "hostile": ["inspect", evil],
    }
    found = {}
    for name, arguments in commands.items():
        found[name] = folder / f"{name}.html"
        ran = run_cli(*arguments, "--html", found[name])
        assert ran.exit_code == 0, ran.stderr
    return found


NAMES = ("resize", "combine", "inspect", "compare", "verify", "extract", "audit", "lint", "list",
         "hostile")  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_reads_well_for_everybody(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str, tmp_path: Path
) -> None:
    """At 400, 800 and 1600 pixels, in light and dark: no word on the console, no request, no
    scrolling sideways, no finding of axe (contrast, names, order), and every chart is drawn."""
    from axe_playwright_python.sync_playwright import Axe

    for width in WIDTHS:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            bypass_csp=True,  # for axe, which is a script
        )
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(pages[name].as_uri())
        assert not said
        assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
        )
        assert drawn
        assert min(drawn) > 200
        found = Axe().run(page).response["violations"]
        assert not [(f["id"], f["nodes"][0]["html"]) for f in found]
        picture = page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert len(picture) > 10_000
        context.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_prints(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """On a few sheets of paper, with its tables whole."""
    page = browser.new_page()
    page.goto(pages[name].as_uri())
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate(
        "[...document.querySelectorAll('.wide')].every(t => getComputedStyle(t).overflow"
        " === 'visible')"
    )
    page.close()
