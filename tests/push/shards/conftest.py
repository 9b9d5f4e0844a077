"""A Hub with a base of seven shards, and what merging it here gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import contents, paths, run
from helpers.places import FIXTURES
from helpers.shard_pushes import INPUTS, split


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split(FIXTURES / "base", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def stock(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/base", dict(paths(base)))
        server.add("org/adapter", dict(paths(FIXTURES / "adapter")))
        yield server


@pytest.fixture(scope="module")
def local(stock: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the merge gives without --push."""
    place = tmp_path_factory.mktemp("local")
    run(stock, place / "home", *INPUTS, "-o", place / "out")
    return contents(place / "out")
