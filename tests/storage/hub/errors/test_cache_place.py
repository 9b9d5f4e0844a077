"""Where the cache of downloads lies, and disks that do not take it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import downloads, refused, run


def test_a_home_that_cannot_be_made(hub: HubServer, tmp_path: Path) -> None:
    """HF_HOME below a file: one clear error that names the place, not a traceback."""
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "home")
    command = ["resize", "org/adapter", "--rank", "8", "-o", tmp_path / "out"]
    found = refused(hub, tmp_path / "home", *command, HF_HOME=place)
    assert place in found["message"]


@pytest.mark.parametrize(("verb", "size"), [("resize", "200k"), ("merge", "1000k")])
def test_a_full_disk_under_the_cache(
    hub: HubServer, disk: Callable[[str], Path], tmp_path: Path, verb: str, size: str
) -> None:
    """No room for what is downloaded is told as such, and nothing is written."""
    place = disk(f"size={size}")
    out = tmp_path / "out"
    command = {
        "resize": ["resize", "org/adapter", "--rank", "8", "-o", out],
        "merge": ["merge", "org/base", "org/adapter", "-o", out],
    }[verb]
    found = refused(hub, tmp_path / "home", *command, HF_HOME=str(place / "home"))
    assert "are free at the download cache" in found["message"]
    large = "/cdn/org/base" if verb == "merge" else "/cdn/"
    assert not [r for r in hub.requests(large, "GET") if r.range is None]  # told beforehand
    assert "printed" not in found["message"]
    assert not out.exists()


def test_the_cache_is_where_the_environment_says(hub: HubServer, home: Path) -> None:
    """HF_HUB_CACHE moves it, as for every program that uses the Hub."""
    place = home / "other"
    run(hub, home, "inspect", "org/adapter", HF_HUB_CACHE=str(place))
    assert (place / "models--org--adapter" / "snapshots").is_dir()
    assert not (home / "hub").exists()
    hub.clear()
    run(hub, home, "inspect", "org/adapter", HF_HUB_CACHE=str(place))
    assert downloads(hub) == []
