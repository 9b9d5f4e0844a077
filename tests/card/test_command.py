"""The card command: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from helpers.hub import HubServer, User
from helpers.hub_runs import contents, refused, run
from helpers.pushing import PERSON, WEIGHTS, add, assert_read_only, lora, metadata, push

import loratool
from loratool.errors import FileError


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        card = b"---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n"
        server.add("loratool-fixtures/base", {"README.md": card})
        server.users["hf_member"] = User("member", ("org",), writes=False)
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return lora(tmp_path / "adapter")


def test_the_card_command(hub: HubServer, home: Path, adapter: Path) -> None:
    """Printed with --dry-run, then written, then the same; and it validates."""
    shown = run(hub, home, "card", adapter, "--dry-run").out
    assert not (adapter / "README.md").exists()
    report = run(hub, home, "card", adapter, "--json").json
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert report["text"] == text
    assert report["schema_version"] == 1
    assert report["card"] == "made"
    assert shown.strip() == text.strip()
    assert metadata(text)["license"] == "llama3.1"
    stamp = (adapter / "README.md").stat().st_mtime_ns
    again = run(hub, home, "card", adapter)
    assert "complete as it was" in again.out
    assert (adapter / "README.md").read_text(encoding="utf-8") == text
    assert (adapter / "README.md").stat().st_mtime_ns == stamp
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert_read_only(hub)


def test_a_card_that_changes_meanwhile_stays(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody writes while the card is made is not lost."""

    def made(*_: object) -> tuple[str, str, list[object]]:
        (adapter / "README.md").write_text("mine")
        return "made", "made", []

    monkeypatch.setattr(import_module("loratool.verbs.card"), "card_of", made)
    with pytest.raises(FileError, match="changed"):
        loratool.card(adapter)
    assert contents(adapter)["README.md"] == b"mine"
    assert len(contents(adapter)) == 3


def test_a_card_that_is_a_link_out_is_not_read(adapter: Path) -> None:
    """What it leads to would become a part of the folder's own card."""
    (adapter.parent / "outside.txt").write_text("words from elsewhere")
    (adapter / "README.md").symlink_to("../outside.txt")
    with pytest.raises(FileError, match="link out"):
        loratool.card(adapter)
    (adapter.parent / "outside.txt").unlink()
    with pytest.raises(FileError, match="broken link"):
        loratool.card(adapter)
    assert (adapter / "README.md").is_symlink()


def test_the_card_command_keeps_words(hub: HubServer, home: Path, adapter: Path) -> None:
    """A person's card is completed in its own line breaks; a broken one is left alone."""
    readme = add(adapter, "README.md", PERSON.encode())
    run(hub, home, "card", adapter, "--repo", "org/name")
    card = readme.read_bytes().decode()
    assert "# My adapter\r\n\nWords  of a person. \n" in card
    assert '"org/name"' in card
    for data in (b"---\na: [\n---\nWords.\n", "Adaptér\n".encode("latin-1")):
        readme.write_bytes(data)
        found = refused(hub, home, "card", adapter)
        assert "README.md" in found["message"]
        assert readme.read_bytes() == data
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("{adapter}x", [], 1),
        ("{adapter}/adapter_config.json", [], 1),
        ("{empty}", [], 1),
        ("", [], 2),
        ("{adapter}", ["--repo", "name"], 2),
    ],
)
def test_card_mistakes(
    hub: HubServer, home: Path, adapter: Path, path: str, options: list[str], code: int
) -> None:
    """One clear error; no README.md where there is no model."""
    empty = adapter.parent / "empty"
    empty.mkdir()
    given = path.format(adapter=adapter, empty=empty)
    refused(hub, home, "card", given, *options, code=code, cwd=adapter)
    assert not list(adapter.parent.rglob("README.md"))


def test_a_licence_that_is_not_known_is_told(
    hub: HubServer, home: Path, tmp_path: Path, repo: str
) -> None:
    """A card without a licence is a warning, not a guess."""
    folder = lora(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/not-there"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = push(hub, home, folder, repo)
    assert "licence-unknown" in done.err
    assert "license" not in metadata(hub.files(repo)["README.md"].decode())
