"""Hub ids, local bases, numbers and names: what is certain is said, in one cell and on one line."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.cards import ADAPTER, BASE, blocks, changed_record, data, logits, run_code
from helpers.cli import run_cli

import loratool
from loratool import card
from loratool.publishing import card_upload
from loratool.publishing.cards.document import END, base_of, make_card
from loratool.publishing.cards.facts import hub_id
from loratool.publishing.cards.markdown import markdown_of
from loratool.publishing.cards.modules import span
from loratool.sheet import Sheet, code, said
from loratool.words import percent


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/name", "org/name"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("roberta-large", "roberta-large"),
        ("t5-small", "t5-small"),
        ("/cache/hub/models--org--my-name/snapshots/0123", "org/my-name"),
        ("base", None),
        ("", None),
        (None, None),
        (7, None),
        ("/data/llama", None),
        ("~/llama", None),
        ("./llama", None),
        ("../models/llama", None),
        ("models/llama", None),
        ("a/b/c", None),
        ("C:\\models\\llama", None),
        ("out/checkpoint-500", None),
        ("org/name.safetensors", None),
        ("org/name\n", None),
        ("org/na me", None),
        ("-org/name", None),
        ("org/a--b", None),
    ],
)
def test_hub_ids(name: object, wanted: str | None) -> None:
    """Only what can be an id on the Hub is taken for one: no path, no file, no odd characters."""
    assert hub_id(name) == wanted


@pytest.mark.parametrize("name", ["/home/someone/llama", "./llama", "", None, "C:\\llama"])
def test_local_bases_are_left_out(tmp_path: Path, name: str | None) -> None:
    """The base is said to be unknown, and the code asks for it."""
    folder = shutil.copytree(ADAPTER, tmp_path / "local")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = make_card(folder, None)
    assert base_of(folder) is None
    assert "base_model" not in data(text)
    assert "base model that is not recorded here" in text
    assert "llama" not in text.partition("As it is")[0]  # after which programs are named
    assert "# Which base model this is for is not recorded" in text
    logits(run_code(text, {"path/to/base": BASE, "path/to/local": folder}))
    named = make_card(folder, None, base_model="org/base")
    assert data(named)["base_model"] == "org/base"
    assert "base_model" not in data(make_card(folder, None, base_model="/home/someone/llama"))


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize(
    "name", ["a|b", "`tick`", "two\nlines", "``` ", "<b>", "_x_", "# x", "a'b\"c", f"{END}", "é ☃"]
)
def test_odd_names(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Names stay in their cells and on their lines, and the code is still Python."""
    change = {"adapters.0": {"name": name}, "options": {name: name}, "versions": {name: name}}
    source = changed_record(made["combined"], tmp_path / "changed", change)
    text = make_card(source, None)
    assert make_card(source, text) == text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for found in tables:
        assert len({cells(line) for line in found.splitlines()}) == 1
    assert len(blocks(text, "python")) == 1
    if "/" not in name:
        folder = shutil.copytree(made["plain"], tmp_path / name)
        text = make_card(folder, None)
        assert make_card(folder, text) == text
        (found,) = blocks(text, "python")
        compile(found, "card", "exec")
        assert text.count("\n# ") == 1 + found.count("\n# ")


def test_odd_modules(tmp_path: Path) -> None:
    """Modules with bars and backticks in their names stay in one cell of the table."""
    folder = write_adapter(tmp_path / "odd", pair("model.a|b.0.q`x", 12, 10), {})
    text = make_card(folder, None)
    (row,) = [line for line in text.splitlines() if "linear" in line]
    assert row.startswith("| ``model.a\\|b.0.q`x`` |")
    assert cells(row) == 7


def test_words() -> None:
    """Code, shares and spans are written so that Markdown and rounding change nothing in them."""
    assert markdown_of(Sheet("card", [said(code("a`b"))])) == "``a`b``"
    assert markdown_of(Sheet("card", [said(code("`"))])) == "`` ` ``"
    assert [percent(x) for x in (1, 0.9999, 0.986, 0.5, 0.01234, 0)] == [
        "100%", "<100%", "98.6%", "50%", "1.2%", "0%"]  # fmt: skip
    assert [span(x) for x in ([], [8.0], [8, 4, 6], [None, 2])] == ["unknown", "8", "4–8", "2"]


@pytest.mark.parametrize(
    ("folder", "named", "wanted"),
    [
        ("base", ["org/Model-8B"], "org/Model-8B"),
        ("Model-8B", ["org/Model-8B"], "org/Model-8B"),
        ("base", ["unsloth/Model-8B-bnb-4bit"], None),
        ("base", ["org/Model-8B-GPTQ"], None),
        ("Model-8B-Instruct", ["org/Model-8B"], None),
        ("base", ["org/Model-8B", "org/Model-9B"], None),
    ],
)
def test_whose_word_is_taken_for_the_base_of_a_merge(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    named: list[str],
    wanted: str | None,
) -> None:
    """An adapter names the base only where nothing speaks against it; else --base is asked for."""
    monkeypatch.setattr(card_upload, "_licence_of", lambda base: (None, "no Hub in this test"))
    base = small_base(tmp_path / folder)
    adapters = [
        write_adapter(tmp_path / f"a{n}", pair(Q, 6, 5, seed=n), {"base_model_name_or_path": name})
        for n, name in enumerate(named)
    ]
    out = tmp_path / "out"
    loratool.merge(base, adapters, out)
    assert base_of(out) == wanted
    text = make_card(out, None)
    assert ("base_model" in data(text)) == (wanted is not None)
    codes = {n.code: n.message for n in card(out, dry_run=True, base=None).warnings}
    assert ("base-unknown" in codes) == (wanted is None)
    if wanted is None:
        assert "--base" in codes["base-unknown"]
        assert named[0] in codes["base-unknown"]
    given = card(out, dry_run=True, base="org/right")
    assert "base-unknown" not in {n.code for n in given.warnings}
    assert data(given.text)["base_model"] == "org/right"


def test_a_base_of_another_name_in_its_config(tmp_path: Path) -> None:
    """What the merge warned of (`base-differs`) the card does not forget."""
    base = small_base(tmp_path / "base")
    config = {"model_type": "llama", "_name_or_path": "org/Model-8B-Instruct"}
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(
        tmp_path / "a", pair(Q, 6, 5), {"base_model_name_or_path": "org/Model-8B"}
    )
    loratool.merge(base, adapter, tmp_path / "out")
    assert base_of(tmp_path / "out") is None


def test_the_licence_is_not_waited_for(tmp_path: Path) -> None:
    """Where the Hub does not answer, the card is there after some seconds and says why."""
    adapter = write_adapter(tmp_path / "a", pair(Q, 6, 5), {"base_model_name_or_path": "org/base"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        done = run_cli("card", adapter, HF_HUB_OFFLINE="0", **settings)
        taken = time.monotonic() - started
    assert done.exit_code == 0, done.stderr
    assert "could not be read in 3 seconds" in done.stderr
    assert taken < 30  # the library alone would go on for minutes
    assert (adapter / "README.md").is_file()


def test_a_base_that_held_adapters_is_not_what_they_name(tmp_path: Path) -> None:
    """The second merge's base is the first one's output, whatever the adapter was trained on."""
    named = {"base_model_name_or_path": "org/Model-8B"}
    one = write_adapter(tmp_path / "one", pair(Q, 6, 5), named)
    two = write_adapter(tmp_path / "two", pair(Q, 6, 5, seed=1), named)
    loratool.merge(small_base(tmp_path / "base"), one, tmp_path / "first")
    loratool.merge(tmp_path / "first", two, tmp_path / "second")
    assert base_of(tmp_path / "first") == "org/Model-8B"
    assert base_of(tmp_path / "second") is None
