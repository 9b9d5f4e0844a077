"""A Hub to push to, and what is pushed to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import HubServer, User
from helpers.places import FIXTURES
from helpers.pushing import lora

import loratool


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        card = b"---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n"
        server.add("loratool-fixtures/base", {"README.md": card})
        server.users["hf_member"] = User("member", ("org",), writes=False)
        yield server


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model of three shards, as loratool wrote it."""
    place = tmp_path_factory.mktemp("output") / "merged"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", place)
    return place


@pytest.fixture
def merged(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "merged"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return lora(tmp_path / "adapter")
