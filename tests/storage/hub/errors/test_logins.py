"""Logins that are missing, unknown, not let in or used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused, run

LOGIN = "hf auth login"


@pytest.mark.parametrize(
    ("repo", "token", "code", "words"),
    [
        ("org/private", None, 4, ["not logged in", LOGIN]),
        ("org/private", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/private", "hf_reader", 1, ["org/private", "not for your account"]),
        ("org/adapter", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/gated", None, 4, ["gated", "/org/gated", LOGIN]),
        ("org/gated", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/missing", None, 4, ["no such repository", "private", LOGIN]),
        ("org/missing", "hf_writer", 1, ["no such repository"]),
    ],
)
def test_logins(
    hub: HubServer, home: Path, repo: str, token: str | None, code: int, words: list[str]
) -> None:
    """A login that is missing or not known is exit code 4 and says what to run; the rest is 1."""
    found = refused(hub, home, "inspect", repo, token=token, code=code)
    assert found["error"] == ("hub-login" if code == 4 else "hub")
    for word in words:
        assert word in f"{found['message']} {found['hint']}"


def test_gated_and_not_let_in(hub: HubServer, home: Path) -> None:
    """Who is logged in learns that it is gated and where to ask; logging in again would not do."""
    done = run(hub, home, "inspect", "org/gated", "--json", token="hf_reader", code=None)
    found = json.loads(done.err)
    assert done.code in (1, 4)
    assert "gated" in found["message"]
    assert f"{hub.url}/org/gated" in found["message"]
    assert "account" in found["hint"]


def test_errors_of_a_base_name_the_base(hub: HubServer, home: Path) -> None:
    """Of two repositories the one that was refused is named."""
    command = ["merge", "org/gated-base", "org/adapter", "-o", home / "out"]
    found = refused(hub, home, *command, token=None, code=4)
    assert "org/gated-base" in found["message"]
    assert LOGIN in found["hint"]
    assert not (home / "out").exists()


@pytest.mark.parametrize("where", ["HF_TOKEN", "stored", "HF_TOKEN_PATH"])
def test_a_login_is_used(hub: HubServer, home: Path, where: str) -> None:
    """From the environment or as `hf auth login` stores it; storage never sees it."""
    home.mkdir()
    settings = {}
    if where == "stored":
        (home / "token").write_text("hf_writer\n")
    elif where == "HF_TOKEN_PATH":
        (home / "elsewhere").write_text("hf_writer")
        settings["HF_TOKEN_PATH"] = str(home / "elsewhere")
    token = "hf_writer" if where == "HF_TOKEN" else None
    for repo in ("org/private", "org/gated"):
        done = run(hub, home, "inspect", repo, token=token, **settings)
        assert "hf_writer" not in done.out + done.err
    assert {r.token for r in hub.requests("/api/|/resolve/")} == {"hf_writer"}
    assert {r.token for r in hub.requests("/cdn/")} == {None}


def test_forbidden_is_a_login_error(hub: HubServer, home: Path) -> None:
    """A token that may not read (403) is told so, in the words of the Hub."""
    hub.fail("/resolve/.*adapter_model", 403, times=9, message="Token lacks the right to read")
    found = refused(hub, home, "inspect", "org/adapter", code=4)
    assert "Token lacks the right to read" in found["message"]
    assert LOGIN in found["hint"]
