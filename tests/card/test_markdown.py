"""A sheet as Markdown: what it says is what a reader sees, whatever stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.cards import ADAPTER
from helpers.pages import Page
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import loratool
from loratool.notices import Notice
from loratool.publishing.cards.facts import read_facts
from loratool.publishing.cards.markdown import markdown_of, markdown_title
from loratool.publishing.cards.sections import card_section
from loratool.rendering.drawing import draw
from loratool.rendering.page import page_of
from loratool.rendering.sheets import sheet_for
from loratool.sheet import (
    CodeBlock,
    Curves,
    Facts,
    Heading,
    Line,
    Piece,
    Points,
    Sentence,
    Sheet,
    SheetLine,
    Toned,
    Words,
    code,
    said,
    strong,
    table_of,
)
from loratool.text import printable

EVIL = "<script>alert(1)</script>\x1b[31m&\"'\u202e</table>|`[/](x)"
TEXTS = st.text(st.characters() | st.sampled_from("`*_[]<>#|\\&~!$-+=.1) \n:"), max_size=12)


def read(text: str) -> Page:
    """What a reader of Markdown with tables makes of a text."""
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def shown(*pieces: Piece) -> str:
    return " ".join(read(markdown_of(Sheet("card", list(pieces)))).text.split())


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


@given(a=TEXTS, b=TEXTS)
@example(a="1. x", b="- x")
@example(a="=", b="a\\|b")
@example(a="&amp;", b="``a` |")
def test_any_text_is_shown_as_it_is(a: str, b: str) -> None:
    """Among words, in lists, headings, tables and code, but for spaces."""
    assert shown(said(a)) == one_line(a)
    assert shown(Heading(a)) == one_line(a)
    assert shown(Points([("x ", a), ("y ", b)])) == one_line(f"x {a} y {b}")
    table = table_of("h", "g")
    table.add(a, b)
    assert shown(table) == one_line(f"h g {a} {b}")
    if not one_line(b):
        return
    coded = table_of("h", "g")
    coded.add(code(b), "x")
    assert shown(coded).replace(" ", "") == f"hg{one_line(b)}x".replace(" ", "")
    assert shown(said("x ", code(b))).replace(" ", "") == f"x{one_line(b)}".replace(" ", "")


@pytest.mark.parametrize("link", ["", "https://hub.example/x"])
def test_no_program_ends_a_cell_within_code(link: str) -> None:
    """Before a backslash and a bar, in code, some end the cell: such a text is no code."""
    table = table_of("h", "g")
    table.add(code(r"a\|![x](y)<img src=z>", link), "x")
    row = markdown_of(Sheet("card", [table])).splitlines()[-1]
    assert "`" not in row
    assert r"a\\\|\!\[x\](y)\<img src=z\>" in row


@pytest.mark.parametrize(
    "text", ["see www.evil.example", "http://evil.example", "WWW.evil.example", "me@evil.example"]
)
def test_no_text_becomes_a_link_by_itself(text: str) -> None:
    """The Hub makes links of what looks like an address; a name of a file is none."""
    drawn = markdown_of(Sheet("card", [said(text)]))
    for sign in ("www.", "WWW.", "://", "@"):
        assert sign not in re.sub(r"\\\W", "", drawn)
    assert shown(said(text)) == text


def test_each_piece_has_its_sign() -> None:
    """All pieces, as somebody would write them; charts are for others."""
    table = table_of("module", "rank", caption="Modules")
    table.lines.append(SheetLine({"module": "layers.{0-3}"}, is_section=True))
    table.add("  q", "8")
    sheet = Sheet(
        "card",
        [
            Heading("Use"), said(strong("Plan: "), "see ", code("a.json"), "."),
            Points(["one", code("org/x", "https://hub.example/org/x")]),
            CodeBlock("sh", ["loratool merge"]), table, Line("https://hub.example"),
            Facts([("rank", "8"), ("", "and more"), ("scale", Toned("2", "good"))]),
            Curves("c", "x", "y", [("s", [1.0], [1.0])]),
        ],
        [Notice("odd", "It is odd:\n  - very", "")],
    )  # fmt: skip
    assert markdown_of(sheet).split("\n\n") == [
        "## Use",
        "**Plan:** see `a.json`.",
        "- one\n- [`org/x`](https://hub.example/org/x)",
        "```sh\nloratool merge\n```",
        "**Modules**",
        "| module | rank |\n| --- | --- |\n| **layers.{0-3}** |  |\n| q | 8 |",
        "`https://hub.example`",
        "- **rank**: 8\\\n  and more\n- **scale**: 2",
        "- **warning** `odd`: It is odd: - very",
    ]
    assert markdown_title("a_b_ *c*") == r"# a_b\_ \*c\*"


def test_an_address_stays_what_it_is() -> None:
    """Also where it has signs that Markdown reads."""
    address = "https://hub.example/a_b*c~d?x=1&copy;=[2"
    for known in (address[:-2], address[:-2] + "#!$'"):
        page = read(markdown_of(Sheet("card", [said("see ", code("x", known), ".")])))
        assert page.named("a") == [{"href": known}]
    assert not read(markdown_of(Sheet("card", [said(code("x", address))]))).named("a")


def test_nothing_ends_a_block_of_code() -> None:
    """A line of it that looks like the end makes the fences longer; a line break makes no line."""
    block = CodeBlock("sh", ["````", "a\nb", "  ```` x"])
    assert markdown_of(Sheet("card", [block])) == "`````sh\n````\na\\nb\n  ```` x\n`````"
    assert len(read(markdown_of(Sheet("card", [block]))).named("pre")) == 1


@pytest.mark.parametrize("words", [EVIL, code(EVIL), strong(EVIL), code(EVIL, EVIL)])
def test_no_text_becomes_markup(words: Words) -> None:
    """Wherever it stands: no element of a text, no link that is none, nothing unseen."""
    table = table_of(EVIL, caption=EVIL)
    table.add(words)
    pieces = [Heading(EVIL), Sentence(words), Points([words]), Facts([(EVIL, words)]), table]
    code_lines = [Line(EVIL), CodeBlock("sh", [EVIL])]
    drawn = markdown_of(Sheet(EVIL, [*pieces, *code_lines], [Notice(EVIL, EVIL, EVIL)]))
    page = read(drawn)
    assert not [kind for kind, _ in page.elements if kind in ("script", "a", "img")]
    assert not {"\x1b", "\u202e"} & set(drawn)
    assert page.text.count("<script>alert(1)</script>") == 12


def test_every_form_draws_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    """What a card says is a sheet, so a terminal and a page say it too."""
    sheet = card_section(read_facts(ADAPTER), "org/mine")
    page = Page(page_of([sheet]))
    draw(sheet)
    printed = capsys.readouterr().out
    drawn = read(markdown_of(sheet))
    for form in (page.text, printed, drawn.text):
        assert "It adapts 28 modules with rank 8." in " ".join(form.split())
        assert "PeftModel.from_pretrained(model, adapter)" in form
    for kind in ("h2", "pre", "table", "a"):
        assert len(page.named(kind)) == len(drawn.named(kind)) > 0


def test_any_answer_can_be_markdown(tmp_path: Path) -> None:
    """The form is not that of cards alone."""
    for report in (
        loratool.inspect(ADAPTER, base=ADAPTER.parent / "base"),
        loratool.lint(ADAPTER),
        loratool.resize(ADAPTER, tmp_path / "small", rank=2),
    ):
        drawn = read(markdown_of(sheet_for(report)))
        assert drawn.named("table")
        assert drawn.named("li")
