"""Lists of what is on the Hub: of an owner, of a repository and of a folder in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import downloads, paths, refused, run
from helpers.listing import kohya, model
from helpers.places import FIXTURES
from helpers.pushing import lora


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    place = tmp_path_factory.mktemp("stock")
    for name in ("first", "second"):
        lora(place / "many" / name, seed=ord(name[0]))
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/adapter", dict(paths(FIXTURES / "adapter")))
        server.add("org/model", dict(paths(model(place / "model"))))
        server.add("org/many", dict(paths(place / "many")))
        server.add("org/hidden", dict(paths(lora(place / "hidden"))), private=True)
        server.add("org/gated", dict(paths(lora(place / "gated"))), gated=True)
        torch = {"adapter_model.bin": b"PK\x03\x04" * 2_000_000, "adapter_config.json": "{}"}
        server.add("org/pickled", torch)
        server.add("org/docs", {"README.md": "# nothing"})
        server.add("gpt0", dict(paths(model(place / "gpt0", seed=1))))
        server.add("reader/style", {"x.safetensors": kohya(place / "x.safetensors")})
        yield server


def listed(hub: HubServer, home: Path, *arguments: str, **options: str) -> dict[str, dict]:
    found = run(hub, home, "list", *arguments, "--json", **options).json
    assert not downloads(hub, "org/adapter")
    return {entry["path"]: entry for entry in found["entries"]}


@pytest.mark.parametrize("name", ["org", "hf://org"])
def test_all_of_an_owner_are_listed(stock: HubServer, tmp_path: Path, name: str) -> None:
    """A line for each adapter and model of each repository, from headers; weights stay there."""
    stock.clear()
    found = listed(stock, tmp_path, name)
    assert found.keys() == {
        "org/adapter", "org/model", "org/many/first", "org/many/second", "org/hidden", "org/gated",
        "org/pickled",
    }  # fmt: skip
    adapter = found["org/adapter"]
    assert (adapter["dialect"], adapter["modules"], adapter["ranks"]) == ("peft", 28, [8])
    assert (adapter["trained_from"], adapter["looked_at"]) == ("commit", False)
    assert found["org/model"]["family"] == "llama"
    assert found["org/pickled"]["state"] == "not-read"
    assert "downloaded" in found["org/pickled"]["message"]


def test_what_a_login_may_not_see_is_not_there_or_is_a_line(
    stock: HubServer, tmp_path: Path
) -> None:
    """Private repositories are not named to strangers; gated ones are, with what is wrong."""
    done = run(stock, tmp_path, "list", "org", "--json", token=None)
    found = {entry["path"]: entry for entry in json.loads(done.out)["entries"]}
    assert "org/hidden" not in found
    assert found["org/gated"]["state"] == "not-read"
    assert found["org/adapter"]["state"] == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/many", {"first", "second"}),
        ("hf://gpt0", {"."}),
        ("hf://org/many/first", {"."}),
        ("hf://reader/style/x.safetensors", {"x.safetensors"}),
    ],
)
def test_a_repository_and_a_part_of_it_are_listed(
    stock: HubServer, tmp_path: Path, name: str, expected: set[str]
) -> None:
    """Paths are relative to what was asked for."""
    assert listed(stock, tmp_path, name).keys() == expected


def test_the_table_says_that_no_weights_were_read(stock: HubServer, tmp_path: Path) -> None:
    """Nobody takes the absence of duplicates for a finding."""
    assert "No weights were downloaded" in run(stock, tmp_path, "list", "org").out


def test_an_owner_that_is_not_there_is_an_error(stock: HubServer, tmp_path: Path) -> None:
    """Both readings are named: a path, and a name on the Hub."""
    error = refused(stock, tmp_path, "list", "nobody")
    assert "no such file or directory here" in error["message"]
    assert "on the Hub" in error["message"]
