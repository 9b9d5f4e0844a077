"""A Hub with open, private and gated repositories."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import paths
from helpers.places import FIXTURES


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    adapter = dict(paths(FIXTURES / "adapter"))
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/base", dict(paths(FIXTURES / "base")))
        server.add("org/adapter", adapter)
        server.add("org/private", adapter, private=True)
        server.add("org/gated", adapter, gated=True)
        server.add("org/gated-base", dict(paths(FIXTURES / "base")), gated=True)
        yield server
