"""A Hub that keeps silent, stops half-way, or says what cannot be: one error, and a clean cache."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused

IMPATIENT = {"LORATOOL_HUB_SECONDS": "1"}
LISTING = r"/api/models/org/base/revision/main|/api/models/org/base(\?|$)"
HASH = "a" * 40


def answer(**changes: Any) -> bytes:
    files = [{"rfilename": "config.json", "size": 2, "blobId": HASH}]
    found = {"id": "org/base", "sha": HASH, "private": False, "siblings": files, **changes}
    return json.dumps(found).encode()


def one_file(name: object, size: object = 2) -> bytes:
    return answer(siblings=[{"rfilename": name, "size": size, "blobId": HASH}])


ODD = {
    "commit-above": answer(sha="../../../outside"),
    "commit-absolute": answer(sha="/tmp/outside"),
    "commit-short": answer(sha="abc"),
    "no-commit": answer(sha=None),
    "name-above": one_file("../../config.json"),
    "name-absolute": one_file("/config.json"),
    "name-backslash": one_file("..\\config.json"),
    "name-zero": one_file("config\0.json"),
    "name-long": one_file("x" * 1_000_000),
    "name-empty": one_file("a//b"),
    "twice": answer(siblings=[{"rfilename": "a"}, {"rfilename": "a"}]),
    "negative": one_file("config.json", -1),
    "huge": one_file("config.json", 1 << 80),
    "no-size": one_file("config.json", "2"),
    "no-object": b"[1, 2]",
    "page": b"<html>Sign in to this network</html>",
    "empty": b"",
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_listings(hub: HubServer, home: Path, kind: str) -> None:
    """Nothing is written: neither outside the cache nor under a bad name within it."""
    hub.answer(LISTING, ODD[kind], headers={"Content-Type": "application/json"})
    found = refused(hub, home, "inspect", "hf://org/base")
    assert found["error"] == "hub"
    assert len(found["message"]) < 400
    assert (
        not list(home.rglob("snapshots")) + list(home.rglob("refs")) + list(home.rglob("outside"))
    )


@pytest.mark.parametrize("where", ["/api/models/org/adapter", "/resolve/|/cdn/"])
def test_a_hub_that_never_answers(hub: HubServer, home: Path, where: str) -> None:
    """The error comes in time, and says what was asked for."""
    hub.hang(where)
    started = time.monotonic()
    found = refused(hub, home, "inspect", "org/adapter", **IMPATIENT)
    assert time.monotonic() - started < 15
    assert "org/adapter" in found["message"]
    assert "within 1 s" in found["message"]


def test_a_download_that_stops(hub: HubServer, home: Path) -> None:
    """Half a file, and then nothing."""
    hub.hang("/cdn/.*safetensors", after=1_000)
    started = time.monotonic()
    found = refused(
        hub, home, "resize", "org/adapter", "--rank", "1", "-o", home / "out", **IMPATIENT
    )
    assert time.monotonic() - started < 20
    assert "org/adapter" in found["message"]
    assert not (home / "out").exists()


def test_a_hub_that_sends_a_byte_now_and_then(hub: HubServer, home: Path) -> None:
    """Bytes that drip keep a connection's own time-out from passing, and an answer's time not."""
    hub.drip("/cdn/.*safetensors", 0.2)
    started = time.monotonic()
    found = refused(hub, home, "inspect", "org/adapter", **IMPATIENT)
    assert time.monotonic() - started < 20
    assert "org/adapter" in found["message"]


#: What a server that is no Hub, or a broken one, says to requests for a file's content.
CONTENTS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "redirect-circle": (302, {"Location": "/org/adapter/resolve/main/adapter_config.json"}, b""),
    "redirect-away": (302, {"Location": "http://127.0.0.1:9/x"}, b""),
    "range-refused": (416, {}, b""),
    "page": (200, {"Content-Type": "text/html"}, b"<html>Sign in to this network</html>"),
    "empty": (200, {}, b""),
    "gone": (410, {}, b""),
    "odd-etag": (200, {"ETag": '"../../../outside"', "X-Repo-Commit": HASH}, b"{}"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_odd_answers_for_contents(hub: HubServer, home: Path, kind: str) -> None:
    """Where a file's content should come something else does: one error, nothing outside."""
    status, headers, body = CONTENTS[kind]
    hub.answer("/resolve/|/cdn/", body, times=99, status=status, headers=headers)
    started = time.monotonic()
    found = refused(hub, home, "inspect", "org/adapter", **IMPATIENT)
    assert time.monotonic() - started < 20
    assert len(found["message"]) < 600
    assert not list(home.rglob("outside*"))
