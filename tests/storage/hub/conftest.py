"""A Hub with the fixtures in it, and the same as folders on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import CLUTTER, SIDE, TASKS, downloads, paths, run
from helpers.places import FIXTURES


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `adapter` with the clutter that repositories have, as folders on the disk."""
    place = tmp_path_factory.mktemp("places")
    for name in ("base", "adapter", "tuned"):
        shutil.copytree(FIXTURES / name, place / name)
    shutil.copytree(TASKS / "html", place / "html")
    shutil.copytree(TASKS / "tables", place / "tables")
    for name, data in (CLUTTER | SIDE).items():
        (place / "base" / name).parent.mkdir(exist_ok=True)
        (place / "base" / name).write_bytes(data)
    for name in ("README.md", "checkpoint-10/optimizer.pt", "onnx/model.onnx"):
        (place / "adapter" / name).parent.mkdir(exist_ok=True)
        (place / "adapter" / name).write_bytes(CLUTTER[name])
    shutil.copy(FIXTURES / "base" / "tokenizer.json", place / "adapter")
    (place / "adapter" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return place


@pytest.fixture(scope="module")
def stock(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub that has all of them."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        for name in ("base", "adapter", "tuned", "html", "tables"):
            server.add(f"org/{name}", dict(paths(places / name)))
        yield server


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that may have downloaded anything before."""
    return tmp_path_factory.mktemp("warm") / "home"


@pytest.fixture(scope="module")
def merged(
    stock: HubServer, places: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str], int]:
    """A merge from paths, one from ids, the names that this downloaded, and all its bytes."""
    place = tmp_path_factory.mktemp("merged")
    local, remote, home = place / "local", place / "remote", place / "home"
    stock.clear()
    run(stock, home, "merge", places / "base", places / "adapter", "-o", local, "--reversible")
    assert stock.log == []
    done = run(stock, home, "merge", "org/base", "org/adapter", "-o", remote, "--reversible")
    assert done.err == ""
    return local, remote, downloads(stock), stock.sent()
