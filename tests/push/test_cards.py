"""The card that goes up with a model, beside what a person wrote here or there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused
from helpers.pushing import PERSON, add, as_json, lora, metadata, push

BEGIN, END = "<!-- loratool:begin -->", "<!-- loratool:end -->"


def outside(card: str) -> str:
    """A card without the section that loratool writes."""
    return re.sub(f"{BEGIN}.*{END}", "", card, flags=re.DOTALL)


def test_a_card_is_made(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """With the base, its licence, and the name under which it can be loaded."""
    push(hub, home, adapter, repo)
    text = hub.files(repo)["README.md"].decode()
    found = metadata(text)
    assert found["base_model"] == "loratool-fixtures/base"
    assert found["base_model_relation"] == "adapter"
    assert found["license"] == "llama3.1"
    # The base's file is not in this repository: the link leads to it.
    assert found["license_link"] == f"{hub.url}/loratool-fixtures/base/blob/main/LICENSE"
    assert found["library_name"] == "peft"
    assert f'"{repo}"' in text
    assert str(adapter.parent) not in text


@pytest.mark.parametrize("where", ["here", "there", "branch", "pull-request"])
def test_what_a_person_wrote_stays(
    hub: HubServer, home: Path, adapter: Path, repo: str, where: str
) -> None:
    """Here or on the Hub: byte for byte outside of the section between the markers."""
    if where == "here":
        add(adapter, "README.md", PERSON.encode())
    else:
        hub.add(repo, {"README.md": PERSON.encode()})
    options = {"branch": ["--revision", "next"], "pull-request": ["--create-pr"]}.get(where, [])
    report = as_json(hub, home, adapter, repo, *options)
    assert report["card"] == "completed"
    revision = {"branch": "next", "pull-request": "refs/pr/1"}.get(where, "main")
    card = hub.files(repo, revision)["README.md"].decode()
    body = PERSON.partition("license: mit\n")[2].partition("---\n")[2]
    assert body.rstrip("\n") in card
    assert card.startswith("---\n# mine\n")
    assert "license: mit\n" in card
    assert set(metadata(card)["tags"]) == {"mine", "lora", "loratool", "peft"}
    assert card.count(BEGIN) == 1
    if where == "here":
        assert (adapter / "README.md").read_bytes() == PERSON.encode()


def test_a_card_that_names_a_place_on_this_machine(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """As PEFT writes it for a base that was loaded from a folder: told before anything goes up."""
    add(adapter, "README.md", b"---\nbase_model: /home/me/llama\n---\nWords.\n")
    found = refused(hub, home, "push", adapter, repo)
    assert "'/home/me/llama'" in found["message"]
    assert not hub.exists(repo)


def test_a_config_that_names_a_place_on_this_machine(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """It goes up, because PEFT can be given a base; --base puts its id into the card."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/llama"}))
    done = push(hub, home, adapter, repo, "--base", "org/llama")
    assert "local-base" in done.err
    assert metadata(hub.files(repo)["README.md"].decode())["base_model"] == "org/llama"
    assert refused(hub, home, "push", adapter, repo, "--base", "/home/me/llama", code=2)


def test_two_cards_are_not_chosen_between(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Edited on the Hub, and another one here (as PEFT writes): neither is lost unasked."""
    add(adapter, "README.md", PERSON.encode())
    push(hub, home, adapter, repo)
    first = hub.files(repo)["README.md"]
    assert as_json(hub, home, adapter, repo)["card"] == "kept"  # the same words, completed
    hub.add(repo, {"README.md": first + b"\nWritten on the website.\n"})
    for options in ([], ["--dry-run"]):
        found = refused(hub, home, "push", adapter, repo, *options)
        assert "--include README.md" in found["hint"]
        assert "--exclude README.md" in found["hint"]
    push(hub, home, adapter, repo, "--exclude", "README.md")
    assert b"Written on the website." in hub.files(repo)["README.md"]
    push(hub, home, adapter, repo, "--include", "README.md")
    assert hub.files(repo)["README.md"] == first


def test_a_section_is_renewed_and_no_more(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """After an edit on the Hub the next push changes what is between the markers alone."""
    push(hub, home, adapter, repo)
    made = hub.files(repo)["README.md"].decode()
    edited = made.replace("---\n\n", "---\nWritten on the Hub.\n\n", 1) + "\nAnd below.\n"
    hub.add(repo, {"README.md": edited})
    lora(adapter, seed=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    push(hub, home, adapter, repo)
    card = hub.files(repo)["README.md"].decode()
    assert outside(card) == outside(edited)
    assert "Written on the Hub." in card


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("kind", ["yaml", "latin-1"])
def test_cards_that_cannot_be_read(
    hub: HubServer, home: Path, adapter: Path, repo: str, where: str, kind: str
) -> None:
    """Invalid YAML and other encodings are one clear error, not a loss and not a traceback."""
    data = b"---\na: [\n---\nWords.\n" if kind == "yaml" else "Adaptér\n".encode("latin-1")
    if where == "here":
        add(adapter, "README.md", data)
    else:
        hub.add(repo, {"README.md": data})
    found = refused(hub, home, "push", adapter, repo)
    assert "README.md" in found["message"]
    assert hub.requests("/upload/|/commit/") == []
