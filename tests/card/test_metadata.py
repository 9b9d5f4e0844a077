"""The YAML of a card and its outline: library, relation, tags, base and licence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers.cards import ID, KINDS, data
from helpers.places import FIXTURES

from loratool.publishing.cards.document import BEGIN, END, Licence, make_card

ADAPTERS = ("combined", "resized", "extracted", "plain")

METADATA = {
    "merged": ("transformers", "merge", ["lora", "loratool", "merge"]),
    "two": ("transformers", "merge", ["lora", "loratool", "merge"]),
    "combined": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "resized": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "extracted": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "plain": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "unmerged": ("transformers", None, ["loratool"]),
    "base": ("transformers", None, ["loratool"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_metadata(made: dict[str, Path], kind: str) -> None:
    """Every kind has its library, relation and tags; a base only where its Hub id is known."""
    library, relation, tags = METADATA[kind]
    wanted = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if relation:
        wanted["base_model_relation"] = relation
    if kind in ADAPTERS or relation == "merge":
        wanted["base_model"] = ID
    text = make_card(made[kind], None)
    assert data(text) == wanted
    if kind in ("merged", "two"):
        assert data(make_card(made[kind], None, base_model="me/b"))["base_model"] == "me/b"


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_made_twice_is_the_same(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """It holds no path and no date; a title and one section, and the same again from itself."""
    text = make_card(made[kind], None, repo_id="me/mine")
    assert make_card(made[kind], text, repo_id="me/mine") == text
    copied = shutil.copytree(made[kind], tmp_path / kind)
    assert make_card(copied, None, repo_id="me/mine") == text
    assert text.count(BEGIN) == text.count(END) == 1
    assert "\n# mine\n" in text
    assert str(made[kind].parent) not in text
    assert str(FIXTURES) not in text
    assert not re.search(r"\b20\d\d-\d\d", text)
    assert "None" not in text
    assert "  \n" not in text


def test_licences(made: dict[str, Path]) -> None:
    """The base's licence goes where the card has none, whole or not at all."""
    own = Licence("other", "llama3.1", "https://example.org/licence")
    wanted = {"license": "other", "license_name": "llama3.1",
              "license_link": "https://example.org/licence"}  # fmt: skip
    assert data(make_card(made["plain"], None, licence=own)).items() >= wanted.items()
    kept = data(make_card(made["plain"], "---\nlicense: mit\n---\n", licence=own))
    assert kept["license"] == "mit"
    assert not kept.keys() & {"license_name", "license_link"}
    assert "license" not in data(make_card(made["plain"], None, licence=Licence(None)))
    assert "license" not in data(make_card(made["plain"], None))
